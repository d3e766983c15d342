"""The schemas that training questions are drawn from; `domains` says how this text is read."""

from __future__ import annotations

TRAINING = """
# library
author/authors*16: name=@person; country=@country; birth_year=1901..1985
book/books*34: title=Silent,Red,Lost,Hidden,Golden,Broken + River,Garden,Moon,Letter,Winter,Harbor;
  author_id>author; genre=Poetry|Crime|Fantasy|Romance|History; release_year=1950..2023;
  page_count=80..900; price=4.50..39.90
loan/loans*30: borrower=@person; book_id>book; loan_date=2021-01-05..2023-12-20; fee=0.20..9.90
# hospital
doctor/doctors*15: name=@person; specialty=Cardiology|Surgery|Neurology|Pediatrics;
  salary=52000..190000
patient/patients*34: name=@person; doctor_id>doctor; blood_type=A|B|AB|O; age=1..95;
  weight=12.5..118.0; city=@city
# airline
airline/airlines*15: name=Sky,North,Blue,Royal,Trans,Sun + Wings,Jet,Air,Express; country=@country;
  fleet_size=8..420
flight/flights*34: code=LK,BX,QA,ZR,MT + 101,205,318,422,537,640,751,886; airline_id>airline;
  origin=@city; destination=@city; distance=180..9800; ticket_price=39.50..1250.00
# football
club/clubs*16: name=Riverton,Oakdale,Westbrook,Kingsport,Milford,Ashby + United,City,Rovers;
  city=@city; stadium_capacity=4200..81000; founding_year=1874..1995
player/players*40: name=@person; club_id>club; position=Goalkeeper|Defender|Midfielder|Striker;
  age=17..38; goal_count=0..160; salary=30000..950000
# restaurants
restaurant/restaurants*16: name=Golden,Little,Blue,Old + Spoon,Lantern,Olive,Kitchen,Table;
  cuisine=Italian|Thai|Mexican|Indian|Greek; city=@city; rating=2.1..5.0; seat_count=18..240
dish/dishes*34: name=Spicy,Grilled,Creamy,Roasted,Smoked,Sweet
  + Salmon,Tofu,Lamb,Noodles,Pumpkin,Rice; restaurant_id>restaurant; course=Starter|Main|Dessert;
  price=3.50..48.00; calories=90..1400
# shop
customer/customers*18: name=@person; city=@city; join_date=2017-02-01..2023-11-30
product/products*24: name=Steel,Wooden,Smart,Compact,Classic + Lamp,Kettle,Desk,Clock,Speaker;
  category=Kitchen|Office|Audio|Garden; price=6.90..480.00; stock=0..650
purchase/purchases*40: customer_id>customer; product_id>product; quantity=1..25;
  purchase_date=2022-01-03..2023-12-28; status=Pending|Shipped|Returned|Delivered
# farm
farm/farms*15: name=Green,Sunny,Stone,Maple + Hill,Valley,Acres,Meadow;
  region=North|South|East|West; area=14.5..890.0; owner=@person
harvest/harvests*34: farm_id>farm; crop=Wheat|Corn|Barley|Potato|Soy; harvest_year=2008..2023;
  yield=3.1..98.0; profit=800..96000
# film_studio
director/directors*15: name=@person; nationality=@country; award_count=0..19
movie/movies*34: title=Midnight,Final,Crystal,Distant,Burning,Paper
  + Echo,Station,Voyage,Promise,Shadow,Road; director_id>director;
  genre=Drama|Comedy|Thriller|Horror; release_year=1968..2023; budget=400000..95000000;
  duration=74..201
# school
teacher/teachers*15: name=@person; department=Science|Arts|Languages|Sports; hire_year=1989..2022
course/courses*24: title=Basic,Advanced,Applied,Modern
  + Algebra,Biology,Painting,Rhetoric,Ecology,Logic; teacher_id>teacher;
  level=Beginner|Intermediate|Expert; credits=1..12; room_number=101..340
student/students*34: name=@person; course_id>course; grade=1.0..6.0; age=14..27
# bank
branch/branches*15: name=Central,Harbor,Market,Park,Station + Branch,Office,House; city=@city;
  opening_year=1921..2019; staff_count=4..85
account/accounts*40: owner=@person; branch_id>branch; type=Savings|Checking|Business;
  balance=15.50..98000.00; opening_date=2009-03-01..2023-10-10
# gym
trainer/trainers*15: name=@person; specialty=Yoga|Boxing|Pilates|Strength; hourly_rate=18.0..95.0
member/members*34: name=@person; trainer_id>trainer; plan=Basic|Plus|Premium; age=16..74;
  visit_count=1..320; monthly_fee=19.5..99.0
# railway
station/stations*16: name=@city; region=Coast|Highlands|Plains|Lakes; platform_count=1..24;
  opening_year=1848..1991
train/trains*34: code=RX,IC,EC,TR + 11,24,36,48,52,67,73,81,95,99; station_id>station;
  type=Express|Regional|Freight|Night; top_speed=80..340; coach_count=2..28
# zoo
enclosure/enclosures*15: name=North,South,River,Jungle,Desert + House,Field,Dome;
  climate=Tropical|Arid|Polar|Temperate; area=40.0..5200.0; opening_year=1961..2020
animal/animals*40: name=Bella,Max,Luna,Rocky,Coco,Simba,Nala,Milo + Junior,Star,Spot,Ray,Blue;
  enclosure_id>enclosure; species=Lion|Otter|Parrot|Tortoise|Zebra; age=1..62; weight=0.8..410.0
# music
band/bands*16: name=Velvet,Electric,Broken,Wild,Neon + Foxes,Mirrors,Tigers,Echoes;
  country=@country; formation_year=1962..2018
album/albums*34: title=Summer,Lonely,Endless,Hollow,Bright,Secret
  + Nights,Roads,Dreams,Streets,Tides,Lights; band_id>band; label=Sunrise|Mono|Bluebird|Harvest;
  release_year=1970..2023; track_count=5..24; sales=1200..880000
# real_estate
agent/agents*15: name=@person; agency=Homeline|Keystone|Nestwell|Urbano; commission=1.2..6.5
house/houses*34: address=Oak,Mill,Church,Park,Lake,Bridge
  + Street 4,Road 12,Lane 7,Avenue 31,Court 9,Way 15; agent_id>agent; city=@city;
  bedroom_count=1..8; area=38.0..410.0; price=65000..1450000
# law_firm
lawyer/lawyers*15: name=@person; field=Tax|Family|Criminal|Patent; hourly_rate=90..620;
  admission_year=1985..2021
client/clients*18: name=@person; city=@city; industry=Energy|Retail|Media|Farming
lawsuit/lawsuits*34: lawyer_id>lawyer; client_id>client; outcome=Won|Lost|Settled|Open;
  filing_date=2014-02-01..2023-09-30; damages=2500..890000
# car_rental
garage/garages*15: name=Airport,Downtown,Harbor,Uptown,Mall + North,South,Center; city=@city;
  capacity=12..260
car/cars*40: model=Falcon,Vista,Nomad,Comet,Terra + GT,Eco,Plus,Sport,Mini,Max,One,Duo;
  garage_id>garage; color=Red|Black|White|Silver|Green; daily_price=19.0..210.0;
  mileage=900..185000; build_year=2008..2023
# shipping
port/ports*15: name=@city; country=@country; depth=6.5..24.0; crane_count=2..60
ship/ships*34: name=Ocean,Northern,Silver,Grand,Iron,Pacific + Star,Pearl,Spirit,Queen,Wave,Trader;
  port_id>port; type=Tanker|Ferry|Container|Trawler; length=28.0..399.0; crew_size=4..1200;
  launch_year=1966..2022
# podcasts
host/hosts*15: name=@person; country=@country; follower_count=900..640000
podcast/podcasts*18: title=Daily,Curious,Quiet,Open + Minds,Science,Stories,Markets,Table;
  host_id>host; topic=News|Health|Business|Culture; launch_year=2009..2023
episode/episodes*34: title=First,Strange,Honest,Burning,Second,Hard
  + Question,Idea,Truth,Lesson,Money,Answer; podcast_id>podcast; duration=8..175;
  download_count=150..96000
# software
team/teams*15: name=Core,Data,Mobile,Cloud,Search + Crew,Squad,Guild; office=@city;
  budget=40000..920000
engineer/engineers*34: name=@person; team_id>team; role=Developer|Tester|Designer|Analyst;
  salary=41000..176000; start_date=2012-01-09..2023-10-01
# bakery
bakery/bakeries*15: name=Corner,Sunny,Village,Old + Oven,Crust,Mill,Loaf; city=@city;
  owner=@person; opening_year=1931..2021
cake/cakes*34: name=Lemon,Cherry,Walnut,Honey,Carrot,Vanilla + Tart,Roll,Layer,Ring,Slice,Dream;
  bakery_id>bakery; flavor=Fruity|Nutty|Chocolate|Spiced; price=2.40..62.00; weight=90..2600
# theater
theater/theaters*15: name=Royal,Globe,Lyric,Apollo + Stage,Hall,House,Palace; city=@city;
  seat_count=80..2600
play/plays*34: title=Merry,Tragic,Silent,Foolish,Noble,Jealous
  + King,Widow,Soldier,Clown,Lover,Ghost; theater_id>theater; genre=Comedy|Tragedy|Musical|Satire;
  premiere_date=2003-01-15..2023-12-01; ticket_price=12.0..165.0; act_count=1..5
# energy
company/companies*15: name=Nova,Terra,Volt,Hydro + Power,Energy,Grid,Works; country=@country;
  revenue=2.5..940.0
plant/plants*34: name=Lakeside,Eastgate,Redhill,Fairview,Seaview,Longfield
  + One,Two,Three,Alpha,Beta,Delta; company_id>company; fuel=Solar|Wind|Coal|Gas|Hydro;
  capacity=4..3900; opening_year=1958..2022
# university
faculty/faculties*15: name=Medicine,Law,Physics,History,Music,Chemistry,Economics,Design
  + North,South; dean=@person; budget=150000..9900000
professor/professors*34: name=@person; faculty_id>faculty; rank=Assistant|Associate|Full;
  salary=48000..168000; publication_count=2..310; birth_year=1948..1991
# newspaper
section/sections*15: name=World,Local,Business,Sports,Travel,Science,Opinion,Food + Daily,Weekend;
  editor=@person; staff_count=2..44
article/articles*34: headline=Quiet,Sudden,Bitter,Bold,Rare,Costly
  + Victory,Storm,Election,Strike,Merger,Discovery; section_id>section; author=@person;
  word_count=180..4200; publication_date=2020-01-02..2023-12-30
# insurance
broker/brokers*15: name=@person; region=North|South|East|West; experience=1..38
policy/policies*40: holder=@person; broker_id>broker; type=Home|Auto|Life|Travel;
  premium=45.0..2900.0; coverage=5000..900000; start_year=2004..2023
# chess
federation/federations*15: name=@country; continent=Europe|Asia|Africa|America;
  member_count=40..9800
grandmaster/grandmasters*34: name=@person; federation_id>federation; title_year=1969..2022;
  elo_rating=2400..2860; win_count=12..790; style=Attacking|Positional|Defensive
# construction
contractor/contractors*15: name=Solid,Prime,Atlas,Summit + Build,Works,Homes,Group; city=@city;
  worker_count=5..640
project/projects*34: name=Harbor,Airport,Stadium,Library,Museum,Market
  + Tower,Bridge,Tunnel,Annex,Plaza,Gate; contractor_id>contractor;
  phase=Planning|Digging|Framing|Finished; cost=45000..88000000; start_date=2010-04-01..2023-06-30
# blog
writer/writers*16: name=@person; country=@country; signup_date=2011-01-01..2022-12-31
post/posts*34: title=Ten,Simple,Secret,Smart,Weird,Cheap
  + Tricks,Recipes,Habits,Tools,Places,Books; writer_id>writer;
  topic=Travel|Cooking|Finance|Fitness; view_count=40..97000; like_count=1..5400
"""
