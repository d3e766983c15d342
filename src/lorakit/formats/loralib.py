"""microsoft/LoRA's state dicts: `<module>.lora_A` (r, in), `<module>.lora_B` (out, r).

A MergedLinear stacks what it adapts of a fused projection cut into equal parts: lora_A (r n, in)
and lora_B (out / parts * n, r) for n adapted parts, each with its own r rows of A and block of B.
loralib keeps alpha and which parts are adapted in the model's code, not in the file. Beside the
factors stand trained biases and the examples' heads. A checkpoint of the whole model holds the
frozen weights too; saved in eval mode they have the update merged in, so that they are not read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.targets import Candidate, candidates
from lorakit.errors import AdapterFileError, LorakitWarning, RequestError
from lorakit.formats.foreign import (
    Conversion,
    Names,
    WholeUpdate,
    common_alpha,
    made_adapter,
    pairs_of,
    refuse_dora,
)
from lorakit.formats.loralib_beside import classifying_head, with_what_is_beside
from lorakit.formats.tensor_files import first_line, has_key, read_safetensors, widened

_FILE = "lora.pt"
_ENDINGS = (".lora_A", ".lora_B")
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_SUFFIXES = (".pt", ".bin", ".pth")


class LoralibFormat:
    """A state dict of loralib, as torch.save writes it, or as safetensors."""

    name = "loralib"
    about = "microsoft/LoRA's state dict, merged projections included"

    def recognises(self, path: Path) -> bool:
        """A .pt, .pth or .bin file, safetensors with lora_A as a name's end, or a directory."""
        if path.is_dir():
            return (path / _FILE).is_file()
        return (path.is_file() and path.suffix in _SUFFIXES) or has_key(path, _ENDINGS[0])

    def read(self, path: Path, given: Conversion) -> Adapter:
        """Read an adapter; `given.alpha` is what the training script said, `given.parts` too.

        Raises:
            AdapterFileError: shapes or names that do not fit the base.
            RequestError: no alpha is given.

        Warns:
            LorakitWarning: two of three parts are taken for q and v; other tensors are not read.
        """
        file = path / _FILE if path.is_dir() else path
        if given.alpha is None:
            raise RequestError(
                "loralib's files do not hold alpha: it stands in the training script",
                where=str(file),
                remedy="give it: --alpha 16",
            )
        tensors = _state(file)
        _refuse_other_tools(tensors, file)
        pairs = pairs_of(tensors, _ENDINGS, file)
        names = Names(given.model)
        own = names.require(list(pairs), file)
        known = candidates(given.model)
        factors: dict[str, Factors] = {}
        guessed = False
        for key, (A, B) in pairs.items():
            module = own[key]
            r = B.shape[1] if B.ndim == 2 else A.shape[0]
            if names.kind(module, file).name == "conv2d":
                raise AdapterFileError(
                    "loralib factors a convolution's kernel in a way that no other tool does",
                    where=f"{file}: {module}",
                    remedy="merge it in loralib (eval mode), save, and: lorakit extract",
                )
            whole = names.kind(module, file).shape(names.modules[module])[0]
            if A.shape[0] == r and B.shape[0] == whole:
                scaling = given.alpha / r
                factors[module] = names.factors(module, A, B, scaling=scaling, where=file)
                continue
            parts = [c for c in known.values() if c.module_name == module and c.rows is not None]
            if not parts:
                names.factors(module, A, B, scaling=1.0, where=file)  # says which shapes it has
            chosen = _chosen(parts, A.shape[0] // r, given.parts, where=f"{file}: {module}")
            guessed = guessed or not given.parts
            factors.update(_split(chosen, A, B, alpha=given.alpha, where=f"{file}: {module}"))
        if guessed:
            _warn_of_guess()
        if given.parts and all(f.rows is None for f in factors.values()):
            raise RequestError(
                "the file adapts no fused projection, so that there are no parts to name",
                where="--parts",
                found=", ".join(given.parts),
                remedy="leave --parts out",
            )
        adapter = made_adapter(factors, given, source=file, format_name=self.name)
        return with_what_is_beside(adapter, tensors, given.model, file)

    def head(self, path: Path) -> tuple[str, int] | None:
        """See `classifying_head`.

        Raises:
            AdapterFileError: the file cannot be read.
        """
        return classifying_head(_state(path / _FILE if path.is_dir() else path))

    def write(self, adapter: Adapter, path: Path, given: Conversion) -> Path:
        """Write lora.pt, for `model.load_state_dict(..., strict=False)`.

        One alpha serves all updates; what has another is folded into lora_B.

        Raises:
            RequestError: DoRA, convolutions, parts of unequal size or rank.
        """
        refuse_dora(adapter, "loralib")
        alpha = alpha_written(adapter, given)
        _refuse_mixed_parts(adapter)
        state: dict[str, Tensor] = {}
        for module, group in adapter.modules().items():
            parts = list(group.values())
            if parts[0].kind == "conv2d":
                raise RequestError(
                    "loralib factors a convolution's kernel in another way", where=module
                )
            A, B = _merged(module, parts, alpha)
            state[f"{module}.lora_A"], state[f"{module}.lora_B"] = A, B
        state |= {f"{module}.bias": bias for module, bias in adapter.biases.items()}
        torch.save({**state, **adapter.overrides}, path / _FILE)
        return path / _FILE


def alpha_written(adapter: Adapter, given: Conversion) -> float:
    """The one alpha of a file: what is asked for, else that of the commonest scaling and rank."""
    sites = adapter.factors.values()
    common = common_alpha([f.scaling for f in sites], [f.r for f in sites])
    return common if given.alpha is None else given.alpha


def _state(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its reader stumbles over
        raise AdapterFileError(
            "the state dict cannot be read",
            where=str(file),
            found=first_line(error),
            remedy="save it again: torch.save(loralib.lora_state_dict(model), file)",
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise AdapterFileError(
            "the file holds no state dict", where=str(file), found=type(loaded).__name__
        )
    return {str(k): widened(v) for k, v in loaded.items() if isinstance(v, Tensor)}


def _refuse_other_tools(tensors: Mapping[str, Tensor], file: Path) -> None:
    if any(key.endswith(".lora_a.weight") for key in tensors):
        raise AdapterFileError(
            "these are torchtune's names, and rows of q and k in another order than Hugging Face's",
            where=str(file),
            expected="the adapter in PEFT's layout, which torchtune writes beside its own",
            remedy=f"give the directory with adapter_config.json near {file.parent}",
        )
    peft = [key for key in tensors if key.endswith(".weight") and ".lora_A." in key]
    if peft:
        raise AdapterFileError(
            "these are PEFT's names, and the file says neither rank nor alpha",
            where=str(file),
            found=peft[0],
            remedy="name it adapter_model.bin, and give its directory with adapter_config.json "
            "beside it",
        )


def _chosen(
    parts: Sequence[Candidate], num: int, asked: Sequence[str], *, where: str
) -> list[Candidate]:
    """The parts that the stacked factors are for, in the order of their rows."""
    by_name = {part.name.rpartition(".")[2]: part for part in parts}
    wanted = list(asked) or {2: ["q", "v"], len(parts): list(by_name)}.get(num, [])
    if len(wanted) != num or any(name not in by_name for name in wanted):
        raise AdapterFileError(
            "which parts of the fused projection are adapted cannot be told",
            where=where,
            expected=f"{num} of {', '.join(by_name) or 'no known part'}",
            found=", ".join(asked) or "none named",
            remedy="name them as enable_lora did: --parts q,v",
        )
    return [part for name, part in by_name.items() if name in wanted]


def _split(
    chosen: Sequence[Candidate], A: Tensor, B: Tensor, *, alpha: float, where: str
) -> dict[str, Factors]:
    r = B.shape[1]
    sizes = [part.rows.size for part in chosen if part.rows is not None]
    if A.shape[0] != r * len(chosen) or B.shape[0] != sum(sizes) or len(set(sizes)) != 1:
        raise AdapterFileError(
            "the stacked factors are not those of equal parts",
            where=where,
            expected=f"A ({r * len(chosen)}, in), B ({sum(sizes)}, {r})",
            found=f"A {tuple(A.shape)}, B {tuple(B.shape)}",
        )
    return {
        part.name: Factors(
            A=A[i * r : (i + 1) * r].contiguous(),
            B=B[i * sizes[0] : (i + 1) * sizes[0]].contiguous(),
            alpha=alpha,
            scaling=alpha / r,
            kind=part.kind.name,
            module=part.module_name,
            rows=part.rows,
        )
        for i, part in enumerate(chosen)
    }


def _refuse_mixed_parts(adapter: Adapter) -> None:
    """One list of parts is all that a reader can be told."""
    groups = {
        tuple(name.rpartition(".")[2] for name, f in group.items() if f.rows is not None)
        for group in adapter.modules().values()
    }
    named = sorted(", ".join(group) for group in groups if group)
    if len(named) > 1:
        raise RequestError(
            "fused projections are adapted in different parts, and loralib's file names none",
            where="--to",
            found="; ".join(named),
        )


def _merged(module: str, parts: Sequence[Factors], alpha: float) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of one module; several parts stacked as MergedLinear has them."""
    scaled = [WholeUpdate(module, f.kind, f.A, f.B, f.scaling) for f in parts]
    if parts[0].rows is None:
        return parts[0].A.contiguous(), scaled[0].at(alpha / parts[0].r).contiguous()
    rows = [f.rows for f in parts if f.rows is not None]
    thirds = all(r.count == 1 and r.start % r.length == 0 for r in rows)
    if not thirds or len({(r.length, f.r) for r, f in zip(rows, parts, strict=True)}) > 1:
        raise RequestError(
            "loralib's merged projections have equal parts, one after the other, of equal rank",
            where=module,
            found=", ".join(f"{r.length} rows from {r.start} by {r.step}" for r in rows),
        )
    order = sorted(range(len(parts)), key=lambda i: rows[i].start)
    A = torch.cat([parts[i].A for i in order])
    return A, torch.cat([scaled[i].at(alpha / parts[i].r) for i in order])


def _warn_of_guess() -> None:
    warnings.warn(
        "the file does not say which parts of fused projections are adapted: two are taken "
        "for q and v, as in the paper; --parts names others",
        LorakitWarning,
        stacklevel=4,
    )
