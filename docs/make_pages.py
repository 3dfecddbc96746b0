"""Writes docs/api.md, docs/adapters_support.md and docs/merges.md from the code: `make docs`.

The first holds the public docstrings, the second what is supported, refused and skipped, taken from
the tables that the package itself decides by, the third the registered merges.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
# Modules in the order of the page, and which of their names are public.
MODULES: tuple[tuple[str, Sequence[str] | None], ...] = (
    ("lora_ortho", None),
    ("lora_ortho.adapters", None),
    ("lora_ortho.backends", ("available", "register", "unregister")),
    ("lora_ortho.mask_stream", ("draws", "winners", "thresholds", "masks")),
    ("lora_ortho.diagnostics", None),
    ("lora_ortho.doctor", ("diagnose", "Diagnosis", "self_check")),
    ("lora_ortho.merges", ("Method", "Gives", "register", "method_named")),
    ("lora_ortho.plugins.weights", ("fold_into", "merged", "members")),
)
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
_WIDTH = 96


def api() -> str:
    """The text of docs/api.md."""
    lines = [
        "# API",
        "",
        "Generated from the docstrings by `make docs`. The contract of every mask is",
        "[MASK_STREAM.md](../MASK_STREAM.md).",
    ]
    seen: set[int] = set()
    for name, public in MODULES:
        module = importlib.import_module(name)
        objects = [(key, getattr(module, key)) for key in public or sorted(module.__all__)]
        objects = [
            (key, item)
            for key, item in objects
            if (inspect.isclass(item) or inspect.isfunction(item)) and id(item) not in seen
        ]
        seen.update(id(item) for _, item in objects)
        lines += ["", f"## {name}", "", *_prose(inspect.getdoc(module) or "")]
        for key, item in objects:
            lines += _entry(key, item, "###")
            if inspect.isclass(item):
                for method, function in _methods(item):
                    lines += _entry(f"{key}.{method}", function, "####")
    return "\n".join(lines) + "\n"


def _methods(cls: type) -> Iterable[tuple[str, Any]]:
    """Public methods and properties that the class itself documents."""
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        documented = inspect.isfunction(function) or isinstance(function, property)
        if not name.startswith("_") and documented and function.__doc__:
            yield name, function


def _entry(name: str, item: Any, level: str) -> list[str]:
    signature = [] if isinstance(item, property) else ["", *_signature(name, item)]
    return ["", f"{level} {name}", *signature, "", *_prose(inspect.getdoc(item) or "")]


def _signature(name: str, item: Any) -> list[str]:
    """The call, indented as code; a parameter a line where it is long."""
    if inspect.isclass(item) and issubclass(item, BaseException):
        return [f"    class {name}({item.__mro__[1].__name__})"]
    parameters = list(inspect.signature(item).parameters.values())
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    texts: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not any(t.startswith("*") for t in texts):
            texts.append("*")
        texts.append(_parameter(parameter))
    returns = inspect.signature(item).return_annotation
    end = "" if inspect.isclass(item) or returns is inspect.Signature.empty else f" -> {returns}"
    line = f"    {name}({', '.join(texts)}){end}"
    if len(line) <= _WIDTH:
        return [line]
    return [f"    {name}(", *(f"        {text}," for text in texts), f"    ){end}"]


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    text = f"{stars}{parameter.name}"
    if parameter.annotation is not parameter.empty:
        text += f": {parameter.annotation}"
    if parameter.default is not parameter.empty:
        default = parameter.default
        known = default is None or isinstance(default, (str, int, float, tuple))
        text += f" = {default!r}" if known else " = ..."
    return text


def _prose(text: str) -> list[str]:
    """A docstring as markdown: its sections' entries become list items."""
    lines: list[str] = []
    section = False
    for line in text.splitlines():
        if match := _SECTION.match(line):
            lines += ["", f"*{match[1]}*", ""] if lines and lines[-1] else [f"*{match[1]}*", ""]
            section = True
        elif section and (entry := re.match(r"    (\S[^:]*): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line.startswith("    "):
            item = line.strip()
            is_first = lines and not lines[-1].startswith(("-", "  "))
            lines.append(f"- {item}" if is_first else f"  {item}")
        else:
            section = section and not line
            lines.append(line)
    return lines


def support() -> str:
    """The text of docs/adapters_support.md."""
    from lora_ortho.adapters.files import (
        diffusers_kohya,
        image_file,
        peft_config,
        peft_folder,
        tensor_file,
    )
    from lora_ortho.adapters.models import parents, peft_layers, report

    fused, delta = f"`{report.FUSED}`", f"`{report.DELTA}`"
    convolution, skipped = f"`{report.CONVOLUTION}`", f"`{report.SKIPPED}`"
    fields = [
        *((name, "honoured", "") for name in sorted(peft_config.HONOURED)),
        *((name, "changes nothing", "") for name in sorted(peft_config.NO_EFFECT)),
        *((name, "refused unless off", why) for name, why in sorted(peft_config.REFUSED.items())),
    ]
    layers = [
        *(
            (name, fused if name == "Linear" else delta, _BASES.get(name, "a quantised base"))
            for name in sorted(peft_layers.LINEAR, key=lambda name: (name != "Linear", name))
        ),
        *(
            (name, convolution, "without groups or dilation")
            for name in sorted(peft_layers.CONVOLUTIONS)
        ),
        *((name, "refused", why) for name, why in sorted(peft_layers.REFUSED_LAYERS.items())),
        ("any other", "refused", "not known to this package"),
    ]
    inits = ", ".join(f"`{name}`" for name in sorted(peft_config.HARMLESS_INITS))
    dtypes = ", ".join(f"`{name}`" for name in tensor_file.ITEM_BYTES)
    parts = [
        "# What is supported, refused and skipped",
        "Generated by `make docs` from the tables that the package itself decides by.",
        "## Layers that `attach` finds",
        f"By the class of PEFT's layer. {fused} adds the adapters in place to the output of a "
        f"plain `nn.Linear`; {delta} adds them to whatever the base layer returns. A refused layer "
        f'is an error; with `on_unsupported="skip"` it is left to PEFT and reported as {skipped}.',
        _table(("layer of PEFT", "served as", "note"), layers),
        "Also refused, whatever the layer: variants of LoRA (DoRA and others, by `lora_variant`), "
        "merged layers, convolutions with groups or dilation, and a `forward` set on the layer "
        "itself (accelerate's hooks are supported).",
        "## Layers that their parent does not call",
        "These parents read a layer's weights instead of calling it, so an adapter there would "
        "have no effect, in PEFT either: `attach` and `inject` refuse or skip it. Any other layer "
        "that a forward pass does not reach is `not reached` in the report after that pass; "
        "within what torch.compile runs with gradients this goes unnoticed.",
        _table(
            ("parent", "its layers", "when"),
            [
                (
                    f"`{name}`",
                    ", ".join(f"`{child}`" for child in reader.children),
                    reader.when,
                )
                for name, reader in sorted(parents.READERS.items())
                if reader.children
            ]
            + [
                (
                    "attention of diffusers",
                    ", ".join(map("`{}`".format, children)),
                    f"where it has `{fused}` (`fuse_qkv_projections`)",
                )
                for fused, children in parents.FUSED.items()
            ],
        ),
        "## Adapter files",
        f"Tensors are {dtypes}, and finite. The header is checked before anything is allocated, "
        "pickles are never loaded, and a key that fits nowhere is refused. Keys may contain the "
        "adapter's name (`lora_A.default.weight`) if all of them contain the same one. Next to "
        "the factors, PEFT saves whole base weights of embeddings and of layers it has wrapped "
        "(`lm_head.base_layer.weight`). Such a weight is compared with the model's and ignored "
        "if equal; if it has changed, has another size, or no model is given, it is refused. "
        "An alpha may be negative: the adapter is then subtracted. For what is refused below as "
        f"another kind of adapter, {peft_config.WAY_OUT}.",
        _table(
            ("part of a key", "refused as"),
            [(f"`{part}`", kind) for part, kind in sorted(peft_folder.FOREIGN.items())],
        ),
        "## Files of image models",
        "A diffusers key begins with the part of the pipeline. A kohya key has the layer's "
        "name with underscores and is looked up in the model; two matches are an error. Layers "
        "numbered differently go through diffusers' own converters for "
        + ", ".join(f"`{name}`" for name in sorted(diffusers_kohya._CONVERTERS))
        + ". Names of other programs (ComfyUI's `diffusion_model.…`, musubi's on Wan) are read by "
        "diffusers alone: call `pipeline.load_lora_weights`, then `attach`.",
        _table(
            ("kohya's prefix", "part of the pipeline"),
            [
                (f"`{prefix}`", " or ".join(f"`{part}`" for part in found))
                for prefix, found in image_file._KOHYA.items()
            ],
        ),
        _table(
            ("end of a key", "read as"),
            [(f"`{end}`", _ROLES[role]) for end, role in image_file._ROLES.items()],
        ),
        "## adapter_config.json",
        f"A field that is not listed must be off. `init_lora_weights` may be true, false or one of "
        f"{inits}; the others come with changed base weights. `rank_pattern` and `alpha_pattern` "
        "mean what they mean in PEFT, and a match takes at most pattern times name length steps; "
        "back references, atomic groups and flags are refused.",
        _table(("field", "is", "why"), [(f"`{name}`", how, why) for name, how, why in fields]),
    ]
    return "\n\n".join(parts) + "\n"


_ROLES: Mapping[str, str] = {
    "A": "lora_A (r, d_in)",
    "B": "lora_B (d_out, r)",
    "bias": "bias (d_out,)",
    "alpha": "alpha; a missing one is r",
}
_BASES: Mapping[str, str] = {"Linear": "on a plain `nn.Linear`; any other base as `base + delta`"}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def merges() -> str:
    """The text of docs/merges.md."""
    from lora_ortho.merges import METHODS, Gives

    gives = {Gives.FACTORS: "factors: an adapter", Gives.WEIGHT: "a dense weight"}
    rows = [
        (
            f"`{name}`",
            method.needs,
            gives[method.gives],
            "seed, sample, strata" if method.draws else "nothing",
            ", ".join(f"`{key}={value!r}`" for key, value in method.parameters.items()) or "none",
            method.when,
            method.source,
        )
        for name, method in METHODS.items()
    ]
    header = ("name", "needs", "gives", "drawn by", "parameters", "when", "source")
    parts = [
        "# Merges that are weights",
        "Generated by `make docs` from `lora_ortho.merges.METHODS`; `lora-ortho methods` prints "
        "the same. `export`, and `--export` of `lora-ortho merge`, take those that give factors; "
        "[mergekit](mergekit.md) and [FusionBench](fusion_bench.md) take all. A merge that draws "
        "new masks for every token is no weight: `attach` and `inject` run those.",
        _table(header, rows),
    ]
    return "\n\n".join(parts) + "\n"


PAGES = {"api.md": api, "adapters_support.md": support, "merges.md": merges}


def main() -> None:
    """Writes every page."""
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
