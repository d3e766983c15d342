"""The schemas that training never sees: thirteen to choose a recipe by, eight to report on.

The eight were written after the recipe was fixed, and nothing was changed after they were asked.
"""

from __future__ import annotations

VALIDATION = """
# pharmacy
pharmacy/pharmacies*15: name=Green,Central,Family,Market + Cross,Pharmacy,Drugs,Care; city=@city;
  opening_year=1935..2020
medicine/medicines*34: name=Nor,Vali,Pexo,Zan,Cura,Alti + dol,tin,max,pril,fen,zole;
  pharmacy_id>pharmacy; form=Tablet|Syrup|Cream|Capsule; price=1.90..149.00; dosage=5..950
# cycling
squad/squads*15: name=Alpine,Delta,Sprint,Coastal + Racing,Wheels,Cycling,Riders; country=@country;
  budget=200000..9800000
rider/riders*34: name=@person; squad_id>squad; discipline=Road|Track|Mountain|Cross; age=18..41;
  victory_count=0..94; height=1.55..2.02
# aquarium
tank/tanks*15: name=Reef,Lagoon,Abyss,Coral,Tide + One,Two,Three; volume=400..980000;
  water_type=Fresh|Salt|Brackish
fish/fish*34: name=Dory,Finn,Goldie,Bubbles,Flash,Splash + Red,Sol,Moss,Ivy,Jet,Ash; tank_id>tank;
  species=Clownfish|Grouper|Tetra|Angelfish; length=1.5..240.0; arrival_date=2013-01-01..2023-10-31
# publishing
publisher/publishers*15: name=Pine,Anchor,Lark,Summit + Press,Books,House,Verlag; city=@city;
  founding_year=1845..2012
magazine/magazines*34: title=Modern,Urban,Simple,Global,Weekly,Young
  + Garden,Sailor,Cook,Investor,Parent,Maker; publisher_id>publisher;
  language=English|German|Spanish|French; circulation=2500..890000; price=1.20..18.90
# museum
museum/museums*16: name=National,Royal,City,Coastal,Modern + Gallery,Museum,Collection,Archive;
  city=@city; founding_year=1791..2012; visitor_count=9000..2900000
exhibit/exhibits*34: title=Bronze,Marble,Ancient,Painted,Ivory,Sacred
  + Horse,Mask,Vase,Throne,Dancer,Shield; museum_id>museum;
  material=Wood|Stone|Metal|Glass|Textile; creation_year=1402..1989; insured_value=900..4800000
# hotel
hotel/hotels*16: name=Grand,Palm,Harbor,Alpine,Crown + Plaza,Resort,Inn,Lodge; city=@city;
  star_count=1..5; room_count=12..640
guest/guests*20: name=@person; nationality=@country; point_balance=0..9400
booking/bookings*40: hotel_id>hotel; guest_id>guest; arrival_date=2022-01-04..2023-12-27;
  night_count=1..21; cost=65.00..5400.00; channel=Website|Phone|Agency
# weather
observatory/observatories*16: name=Summit,Valley,Island,Desert,Forest + Point,Post,Base,Watch;
  country=@country; altitude=2..4100; setup_year=1902..2017
measurement/measurements*40: observatory_id>observatory; observer=@person;
  measurement_date=2020-01-01..2023-12-31; temperature=-24.5..43.0; humidity=8..99;
  sky=Clear|Cloudy|Foggy|Stormy
# winery
winery/wineries*16: name=Castle,Oak,Stone,Rosa,Villa + Cellars,Estate,Vineyard,Creek;
  region=Tuscany|Rioja|Mosel|Napa|Barossa; owner=@person; vineyard_area=2.5..310.0
wine/wines*34: label=Noble,Dark,Sunset,Amber,First,Quiet
  + Valley,Reserve,Blend,Harvest,Hill,Barrel; winery_id>winery; grape=Merlot|Riesling|Syrah|Malbec;
  vintage=1988..2022; bottle_price=6.50..420.00; alcohol=9.5..15.9
# space
agency/agencies*15: name=Astra,Orbit,Cosmo,Helio + Agency,Center,Institute,Labs; country=@country;
  annual_budget=25.0..9800.0
mission/missions*34: name=Voyager,Pathway,Horizon,Icarus,Beacon,Nomad + I,II,III,IV,V,X;
  agency_id>agency; target=Moon|Mars|Venus|Asteroid; launch_date=1975-03-01..2023-11-15;
  payload=120..28000; crew_count=0..7
# esports
organization/organizations*15: name=Shadow,Iron,Frost,Rapid + Wolves,Gaming,Legion,Dragons;
  country=@country; founding_year=1999..2021
gamer/gamers*34: nickname=Pixel,Turbo,Ghost,Nova,Blitz,Zero + Fox,King,Byte,Storm,Kid,Ace;
  organization_id>organization; role=Sniper|Support|Captain|Scout; prize_money=400..940000;
  match_count=12..880; reaction_time=0.12..0.41
# charity
charity/charities*15: name=Open,Bright,Helping,Kind + Hands,Futures,Hearts,Homes;
  cause=Education|Health|Animals|Climate; founding_year=1922..2018
donor/donors*18: name=@person; city=@city; birth_year=1936..2001
donation/donations*40: donor_id>donor; charity_id>charity; amount=5.00..9800.00;
  method=Card|Cash|Transfer; donation_date=2019-01-01..2023-12-31
# birds
reserve/reserves*15: name=Heron,Marsh,Eagle,Willow + Lake,Point,Wetland,Woods; country=@country;
  area=12.0..7400.0
bird/birds*34: nickname=Sunny,Peanut,Storm,Pepper,Olive,Ziggy + Wing,Feather,Beak,Tail,Song,Nest;
  reserve_id>reserve; family=Owl|Heron|Falcon|Finch; wingspan=12.0..240.0; sighting_count=1..760;
  tagging_year=1998..2023
# festival
stage/stages*15: name=River,Forest,Sunset,Main,Hill + Stage,Arena,Tent;
  sponsor=Fizzo|Lumen|Bancora|Telco; capacity=150..48000
concert/concerts*34: performer=Crimson,Paper,Static,Lunar,Salty,Gentle
  + Parade,Planets,Boys,Sisters,Machine,Choir; stage_id>stage; style=Rock|Jazz|Folk|Techno;
  start_date=2021-06-01..2023-09-10; ticket_price=9.0..180.0; audience_size=60..41000
"""

HELD_OUT = """
# brewery
brewery/breweries*15: name=Golden,Copper,Old,Northern + Barrel,Anchor,Crown,Kettle; city=@city;
  founding_year=1790..2016; employee_count=3..420
beer/beers*34: name=Hazy,Bitter,Velvet,Smoky,Lazy,Royal + Otter,Monk,Comet,Harvest,Bell,Captain;
  brewery_id>brewery; style=Lager|Stout|Porter|Pilsner; alcohol_content=3.2..11.8; price=1.10..9.80
# ski
resort/resorts*15: name=Snow,Eagle,Crystal,Silver + Peak,Ridge,Valley,Summit; country=@country;
  altitude=640..3480; lift_count=2..94
slope/slopes*34: name=Rabbit,Devil,Thunder,Gentle,Marmot,Icy + Run,Drop,Chute,Bowl,Trail,Face;
  resort_id>resort; difficulty=Easy|Medium|Hard|Expert; length=0.4..11.5; opening_year=1936..2020
# auction
auctioneer/auctioneers*15: name=@person; city=@city; experience_years=2..41
lot/lots*34: title=Gilded,Cracked,Early,Rare,Dutch,Tall + Clock,Mirror,Violin,Globe,Desk,Lamp;
  auctioneer_id>auctioneer; category=Furniture|Jewelry|Art|Coins; start_price=40..88000;
  sale_date=2016-02-01..2023-11-30
# veterinary
vet/vets*15: name=@person; specialty=Surgery|Dentistry|Nutrition|Dermatology; hire_year=1996..2022
pet/pets*36: name=Coco,Rex,Luna,Milo,Nala,Bruno + Bean,Star,Boy,Junior,Bear,Queen; vet_id>vet;
  species=Dog|Cat|Rabbit|Parrot; weight=0.3..62.0; birth_year=2006..2023
# taxi
cab/cabs*16: plate=KX,LM,PR,ZT + 104,377,518,902; fuel=Petrol|Diesel|Hybrid|Electric; seats=3..7;
  purchase_year=2009..2023
ride/rides*40: passenger=@person; cab_id>cab; ride_date=2022-01-03..2023-12-29; distance=0.8..64.0;
  fare=4.20..138.00; payment=Cash|Card|App
# perfume
brand/brands*15: name=Maison,Casa,House,Atelier + Belle,Noir,Flora,Lune; country=@country;
  founding_year=1828..2015
perfume/perfumes*34: name=Midnight,Salty,Golden,Wild,Secret,White
  + Iris,Cedar,Amber,Fig,Musk,Neroli; brand_id>brand; scent=Floral|Woody|Citrus|Spicy;
  volume=15..200; price=18.00..310.00
# expeditions
explorer/explorers*16: name=@person; nationality=@country; birth_year=1870..1985
expedition/expeditions*34: title=Frozen,Hidden,Silent,Distant,Burning,Lost
  + Coast,Plateau,Delta,Passage,Crater,Basin; explorer_id>explorer;
  region=Arctic|Amazon|Sahara|Himalaya; departure_date=1951-04-01..2019-09-30;
  member_count=2..38; cost=12000..940000
# dairy
dairy/dairies*15: name=Meadow,Hill,Brook,Clover + Gold,Farmhouse,Creamery,Fields; city=@city;
  milk_price=0.28..0.74; founding_year=1884..2014
cheese/cheeses*34: name=Little,Blue,Old,Smoked,Creamy,Mountain
  + Baron,Wheel,Pearl,Abbot,Stone,Rose; dairy_id>dairy; milk=Cow|Goat|Sheep|Buffalo;
  fat_content=12.0..62.0; aging_days=7..720
"""
