import torch

from lorakit.layers.placement import Shape, ends_of_prompts, place

# Row 0 is padded on the left, row 1 on the right, row 2 has a hole that is nobody's business.
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])


def layout(causal: bool, ends: list[int] | None, num_prefix: int = 2, num_infix: int = 1) -> list:
    """Each row as text: pN prefix, iN infix, a number a token, a dot in front of padding."""
    shape = Shape(num_prefix, num_infix, causal)
    found = place(MASK, None if ends is None else torch.tensor(ends), shape, unpadded=False)
    names = [f"p{i}" for i in range(num_prefix)] + [f"i{i}" for i in range(num_infix)]
    rows = []
    for row in range(len(MASK)):
        at = {int(c): str(token) for token, c in enumerate(found.tokens[row])}
        at |= {int(c): name for name, c in zip(names, found.special[row], strict=True)}
        assert sorted(at) == list(range(found.width)), "every column is used, and once"
        rows.append(
            " ".join(("" if found.mask[row, c] else ".") + at[c] for c in range(found.width))
        )
    return rows


def test_a_decoder_has_its_prefix_in_front_and_its_infix_behind_the_prompt() -> None:
    assert layout(True, [4, 2, 5]) == [
        ".0 .1 p0 p1 2 3 i0 4",
        "p0 p1 0 1 i0 2 .3 .4",
        "p0 p1 0 .1 2 3 4 i0",
    ]


def test_without_labels_the_infix_stands_behind_the_last_token() -> None:
    assert layout(True, None) == [
        ".0 .1 p0 p1 2 3 4 i0",
        "p0 p1 0 1 2 i0 .3 .4",
        "p0 p1 0 .1 2 3 4 i0",
    ]


def test_an_encoder_keeps_its_first_token_first() -> None:
    assert layout(False, None) == [
        ".0 .1 2 p0 p1 3 4 i0",
        "0 p0 p1 1 2 i0 .3 .4",
        "0 p0 p1 .1 2 3 4 i0",
    ]


def test_an_end_outside_the_tokens_is_the_nearest_inside() -> None:
    assert layout(True, [0, 5, 9], num_prefix=1) == [
        ".0 .1 p0 i0 2 3 4",
        "p0 0 1 2 i0 .3 .4",
        "p0 0 .1 2 3 4 i0",
    ]


def test_only_a_decoder_reads_what_follows_the_prompt_at_the_infix() -> None:
    ends = torch.tensor([4, 2, 5])
    causal = place(MASK, ends, Shape(2, 2, True), unpadded=False)
    assert causal.outputs[0].tolist() == [0, 1, 4, 7, 8]  # token 3 is the prompt's last
    assert causal.outputs[1].tolist() == [2, 5, 6, 7, 8]
    prefix_only = place(MASK, ends, Shape(2, 0, True), unpadded=False)
    assert prefix_only.outputs.equal(prefix_only.tokens)
    encoder = place(MASK, ends, Shape(2, 2, False), unpadded=False)
    assert encoder.outputs.equal(encoder.tokens)


def test_values_are_spread_and_collected() -> None:
    shape = Shape(1, 2, causal=True)
    placement = place(MASK, torch.tensor([4, 2, 5]), shape, unpadded=False)
    tokens = torch.arange(15.0).view(3, 5, 1)
    special = -torch.arange(1.0, 4.0).view(1, 3, 1).expand(3, -1, -1)
    spread = placement.spread(tokens, special)
    assert spread[0, :, 0].tolist() == [0, 1, -1, 2, 3, -2, -3, 4]
    assert placement.replace(spread, special - 5)[1, :, 0].tolist() == [-6, 5, 6, -7, -8, 7, 8, 9]
    # The prompt's last token shows the last infix position's output.
    assert placement.collect(spread)[0, :, 0].tolist() == [0, 1, 2, -3, 4]


def test_the_prompt_ends_in_front_of_the_first_label() -> None:
    labels = torch.tensor([[-100, -100, 7, -100, 8], [-100] * 5, [0, 1, 2, 3, 4]])
    assert ends_of_prompts(labels, -100).tolist() == [2, 5, 0]
