"""Everything needed to load and run a PGSVD checkpoint, in one file that imports torch and transformers only.

Inside the optimum-pgsvd package this file is the runtime. A checkpoint saved with `self_contained=True` carries a copy
of it, so that `from_pretrained(..., trust_remote_code=True)` works where the package is not installed.

A compressed layer holds `W ≈ left @ right` as two plain linears: `right` (in_features → rank, no bias), then `left`
(rank → out_features, with the layer's bias). In pivoted storage it holds some rows of W as one linear, `basis`, and
what makes the other rows of them as another, `coefficients`.
"""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


QUANT_METHOD = "pgsvd"

# Version of a checkpoint's layout by how its layers are stored: what reads one reads those before it.
FORMATS = {"factors": 1, "pivoted": 2}


class _LazyProduct(Tensor):
    """The weight of a layer, with its shape, dtype and device known and the product made only when it is used."""

    layer: "LowRankLayer"
    _is_hf_initialized: bool

    @staticmethod
    def __new__(cls, layer: "LowRankLayer"):
        factor = layer.first.weight
        shape = (
            (layer.in_features, layer.out_features) if layer.transposed else (layer.out_features, layer.in_features)
        )
        lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=factor.dtype, device=factor.device)
        lazy.layer = layer
        lazy._is_hf_initialized = True  # models that initialise missing weights by name leave this one alone
        return lazy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"weight of {self.layer}"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("__get__", "size", "dim", "numel", "is_floating_point", "element_size"):
            return super().__torch_function__(func, types, args, kwargs)
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        def product(value):
            return value.layer.product() if isinstance(value, cls) else value

        return func(*map(product, args), **{key: product(value) for key, value in (kwargs or {}).items()})


class LowRankLayer(nn.Module):
    """A linear layer whose weight is of low rank: what the ways to store one share.

    Args:
        in_features: n.
        out_features: m.
        rank: r.
        bias: whether the layer has a bias.
        transposed: the layer stands for a transformers `Conv1D`, whose weight is stored `(n, m)`.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, in_features, out_features, rank, bias=True, transposed=False, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.rank, self.transposed = in_features, out_features, rank, transposed

    def linears(self) -> dict[str, nn.Linear]:
        """The linears that it is made of."""
        return {name: child for name, child in self.named_children() if isinstance(child, nn.Linear)}

    @property
    def first(self) -> nn.Linear:
        """The linear that inputs meet first."""
        raise NotImplementedError

    @property
    def biased(self) -> nn.Module:
        """The module that has the bias."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight this layer stands for, `(m, n)`, multiplied in a dtype."""
        raise NotImplementedError

    @classmethod
    def like(cls, linear: Any, rank: int, device=None) -> Any:
        """An uninitialised layer with the features, bias and dtype of an `nn.Linear` or `Conv1D`."""
        transposed = isinstance(linear, Conv1D)
        out_features, in_features = linear.weight.shape[::-1] if transposed else linear.weight.shape
        return cls(
            in_features, out_features, rank, linear.bias is not None, transposed, device, linear.weight.dtype
        ).train(linear.training)

    def product(self) -> Tensor:
        """The weight this layer stands for, `(m, n)`, or `(n, m)` for a `Conv1D`."""
        weight = self.matrix(self.first.weight.dtype)
        return weight.T if self.transposed else weight

    @property
    def weight(self) -> Tensor:
        """The weight this layer stands for, read only; model code that only asks for its dtype costs nothing."""
        return self.product() if torch.compiler.is_compiling() else _LazyProduct(self)

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The `nn.Linear` or `Conv1D` with the product as its weight, multiplied in float32 or better."""
        factor = self.first.weight
        product = self.matrix(torch.promote_types(factor.dtype, torch.float32)).to(dtype)
        dense: Any
        bias: Any = self.bias
        if self.transposed:
            dense = Conv1D(self.out_features, self.in_features).to(device=factor.device, dtype=dtype)
            dense.weight = nn.Parameter(product.T.contiguous())
        else:
            dense = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
            dense.weight = nn.Parameter(product)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().to(dtype))
        return dense

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(LowRankLayer):
    """A linear layer held as two: `left(right(x))`; the bias belongs to `left`. For arguments see `LowRankLayer`."""

    def __init__(self, in_features, out_features, rank, bias=True, transposed=False, device=None, dtype=None):
        super().__init__(in_features, out_features, rank, bias, transposed, device, dtype)
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., n)` to `(..., m)`."""
        return self.left(self.right(x))

    @property
    def first(self) -> nn.Linear:
        """The linear that inputs meet first."""
        return self.right

    @property
    def biased(self) -> nn.Module:
        """The module that has the bias."""
        return self.left

    @property
    def bias(self) -> Tensor | None:
        """Bias `(m,)` or `None`."""
        return self.left.bias

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight this layer stands for, `(m, n)`, multiplied in a dtype."""
        return self.left.weight.to(dtype) @ self.right.weight.to(dtype)


# Numbers from which on a pivoted layer puts its outputs in order by writing each in its place.
MANY_OUTPUTS = 2**18


class PivotedLinear(LowRankLayer):
    """A linear layer of rank r held as r rows of its weight, and what makes the other rows of those.

    Outputs are `[z, coefficients(z)]` with `z = basis(x)`, put in order; then the bias is added. Output i is number
    `order[i]` of those. Where the rank is the number of outputs, there are no `coefficients`. For arguments see
    `LowRankLayer`.

    Source:
        arXiv 2501.19090 (PIFA).
    """

    order: Tensor

    def __init__(self, in_features, out_features, rank, bias=True, transposed=False, device=None, dtype=None):
        super().__init__(in_features, out_features, rank, bias, transposed, device, dtype)
        rest = out_features - rank
        self.basis = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.coefficients = nn.Linear(rank, rest, bias=False, device=device, dtype=dtype) if rest else None
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("order", torch.arange(out_features, device=device, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., n)` to `(..., m)`."""
        rows = self.basis(x)
        parts = [rows] if self.coefficients is None else [rows, self.coefficients(rows)]
        # of matrices, because in more dimensions a CPU takes ten times as long
        outputs = in_order([part.reshape(-1, part.shape[-1]) for part in parts], self.order).view(*x.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias

    @property
    def first(self) -> nn.Linear:
        """The linear that inputs meet first."""
        return self.basis

    @property
    def biased(self) -> nn.Module:
        """The module that has the bias."""
        return self

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight this layer stands for, `(m, n)`, multiplied in a dtype."""
        rows = self.basis.weight.to(dtype)
        if self.coefficients is not None:
            rows = torch.cat([rows, self.coefficients.weight.to(dtype) @ rows])
        return rows.index_select(0, self.order)


def in_order(parts: list[Tensor], order: Tensor) -> Tensor:
    """`(T, m)`, of which column i is column `order[i]` of the parts `(T, ·)` side by side."""
    count = parts[0].shape[0]
    if count * order.shape[0] < MANY_OUTPUTS:
        return torch.cat(parts, dim=1).index_select(1, order)
    # Each column is put where it belongs: on a CPU that takes half the time of collecting them, of half precision.
    numbers = torch.arange(order.shape[0], device=order.device)
    places = torch.empty_like(numbers).scatter_(0, order.long(), numbers)
    outputs = parts[0].new_empty(count, order.shape[0])
    for part, where in zip(parts, places.split([part.shape[1] for part in parts]), strict=True):
        outputs.index_copy_(1, where, part)
    return outputs


LAYERS: dict[str, type[LowRankLayer]] = {"factors": LowRankLinear, "pivoted": PivotedLinear}


class Expert(nn.Module):
    """The matrices of one expert as linears: `gate_up`, or `up` where experts have no gate, and `down`."""

    def __init__(self, linears: dict[str, nn.Linear]):
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)


class LinearExperts(nn.ModuleList):
    """The experts of a mixture, each with linears of its own, in the place of a module that holds them all as one.

    transformers stacks the matrices of all experts into one parameter with three dimensions. Taken apart, each is a
    linear like any other, and shares its memory with the stack it was a part of.

    Args:
        fused: the stock module, for which `is_fused`; it is not changed.

    Attributes:
        stock: that module without its weights, which knows all else about the experts; in a tuple, so that it is no
            submodule.
    """

    def __init__(self, fused: Any):
        super().__init__(Expert(linears_of(fused, number)) for number in range(len(fused.down_proj)))
        shell = copy.copy(fused)
        shell._parameters = {
            name: nn.Parameter(value.detach().to("meta"), value.requires_grad)
            for name, value in fused.named_parameters()
        }
        self.stock = (shell,)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What each token's experts make of it, weighted and summed.

        Args:
            hidden_states: `(tokens, hidden)`.
            top_k_index: `(tokens, k)`, the experts of each token.
            top_k_weights: `(tokens, k)`.

        Returns:
            `(tokens, hidden)`.
        """
        chosen, k = top_k_index.flatten(), top_k_index.shape[-1]
        order = chosen.argsort(stable=True)
        rows = hidden_states[order // k].split(chosen.bincount(minlength=len(self)).tolist())
        made = torch.cat([self.apply_to(expert, part) for expert, part in zip(self, rows, strict=True) if len(part)])
        weighted = made[order.argsort()] * top_k_weights.reshape(-1, 1)
        return weighted.view(*hidden_states.shape[:1], k, -1).sum(1).to(hidden_states.dtype)

    def apply_to(self, expert: Any, rows: Tensor) -> Tensor:
        """What one expert makes of the tokens that chose it, `(tokens, hidden)`."""
        (stock,) = self.stock
        inner = stock._apply_gate(expert.gate_up(rows)) if stock.has_gate else stock.act_fn(expert.up(rows))
        return expert.down(inner)

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """The stock module with the weights of these linears, stacked; all must be dense."""
        whole = copy.copy(self.stock[0])
        whole._parameters = {}
        for name, like in self.stock[0].named_parameters():
            linears = [getattr(expert, name.split("_proj")[0]) for expert in self]
            parts = [linear.bias if name.endswith("_bias") else linear.weight for linear in linears]
            parts = [part.T if part.dim() == 2 and whole.is_transposed else part for part in parts]
            whole._parameters[name] = nn.Parameter(torch.stack(parts), like.requires_grad)
        return whole.train(self.training)


def linears_of(fused: Any, number: int) -> dict[str, nn.Linear]:
    """The matrices of one of fused experts as linears, in the memory of the whole."""
    linears = {}
    for name in ("gate_up", "down") if fused.has_gate else ("up", "down"):
        stack = getattr(fused, f"{name}_proj")
        weight, bias = stack.detach()[number], getattr(fused, f"{name}_proj_bias", None)
        weight = weight.T if fused.is_transposed else weight
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, stack.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach()[number], bias.requires_grad)
        linears[name] = linear
    return linears


def is_fused(module: Any) -> bool:
    """Whether a module holds experts in the way that all of transformers' own kernels for them take."""
    if not hasattr(module, "has_gate") or getattr(module, "has_post_expert_norm", False):
        return False
    names = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    biases = {f"{name}_bias" for name in names} if module.has_bias else set()
    parameters = dict(module.named_parameters())
    return parameters.keys() == names | biases and all(parameters[name].dim() == 3 for name in names)


def take_experts_apart(model: nn.Module) -> dict[str, nn.Module]:
    """Give every expert of a model linears of its own.

    Returns:
        The fused modules in whose place they are, by name.
    """
    fused = {name: module for name, module in model.named_modules() if is_fused(module)}
    for name, module in fused.items():
        set_submodule(model, name, LinearExperts(module))
    return fused


def put_experts_back(model: nn.Module, fused: dict[str, nn.Module], needed) -> None:
    """Put the fused experts of a model back in their places, but for those with a layer that is needed apart.

    Args:
        model: changed in place.
        fused: of `take_experts_apart`.
        needed: names of layers.
    """
    for name, module in fused.items():
        if not any(layer.startswith(f"{name}.") for layer in needed):
            set_submodule(model, name, module.train(model.get_submodule(name).training))


class LowRankConfig(QuantizationConfigMixin):
    """What loading needs of a checkpoint's `quantization_config`; every other field is kept as it is.

    Args:
        ranks: rank of each compressed layer by its name in the checkpoint.
        format_version: of the checkpoint's layout.
        provenance: how the checkpoint was made, and, where that is not as factors, its `storage`.
    """

    storage = "factors"

    def __init__(self, ranks, format_version=1, quant_method=QUANT_METHOD, **provenance):
        check_format(format_version, provenance.get("storage", "factors"))
        self.quant_method = quant_method
        self.ranks: dict[str, int] | None = dict(ranks)
        self.format_version = format_version
        self.__dict__.update(provenance)


def check_format(version: int, storage: str) -> None:
    """Raise `RuntimeError` when a checkpoint has a newer format than this code reads, or one that is not its own."""
    newest = max(FORMATS.values())
    if version > newest:
        raise RuntimeError(
            f"this checkpoint has PGSVD format {version}, and this runtime reads up to {newest}; upgrade with "
            "`pip install -U optimum-pgsvd`"
        )
    if FORMATS.get(storage) != version:
        raise RuntimeError(
            f"this checkpoint has PGSVD format {version} with storage={storage!r}, and there is no such format; its "
            "config.json is damaged or was edited, download it again"
        )


class LowRankQuantizer(HfQuantizer):
    """Rebuilds the low-rank layers of a checkpoint before its weights are loaded, and checks that all of them came."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self, *args, **kwargs) -> bool:
        """Compressed models are saved by the ordinary `save_pretrained`."""
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            self._build_layers(model, stock_conversions(model))
            check_factors_while_loading(model, self.quantization_config.ranks)
        return model

    def update_weight_conversions(self, weight_conversions, model):
        """The stock's; layers whose names only a user's `key_mapping` translates are built here, where it comes in."""
        if self.pre_quantized and not low_rank_layers(model):
            self._build_layers(model, weight_conversions)
        return super().update_weight_conversions(weight_conversions, model)

    def _build_layers(self, model, conversions):
        """Put low-rank layers of the checkpoint's ranks in their places, on the meta device."""
        fused = take_experts_apart(model)
        names = model_names(model, self.quantization_config.ranks, conversions)
        put_experts_back(model, fused, names)
        layer = LAYERS[self.quantization_config.storage]
        for name, rank in names.items():
            set_submodule(model, name, layer.like(model.get_submodule(name), rank, device="meta"))
        tripwires = {rf"^{re.escape(name)}\.weight$" for name in names}
        tripwires |= {rf"^{re.escape(name)}\.\w+_proj$" for name in apart_experts(model)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *tripwires}

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            raise_for(misshapen_factors(model) + damaged_orders(model))
            record_ranks(model, self.quantization_config)
        return model

    def get_state_dict_and_metadata(self, model):
        """The state to save, with the ranks brought up to date and a tripwire for every layer."""
        record_ranks(model, self.quantization_config)
        return {**model.state_dict(), **tripwires(model)}, {}

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in low_rank_layers(model).items():
            set_submodule(model, name, layer.to_dense(dtype or layer.first.weight.dtype))
        for name, experts in apart_experts(model).items():
            set_submodule(model, name, experts.fused())
        return model

    def remove_quantization_config(self, model):
        """Leave nothing of the compression in a model that is dense again."""
        super().remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                for name in ("_is_quantized", "quantization_config"):
                    vars(module.config).pop(name, None)
                vars(module).pop("hf_quantizer", None)
        vars(model.config).pop("auto_map", None)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The low-rank layers of a model by name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def apart_experts(model: nn.Module) -> dict[str, LinearExperts]:
    """The experts of a model that are taken apart, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearExperts)}


def tripwires(model: Any) -> dict[str, Tensor]:
    """One-element tensors under the names of the dense weights of compressed layers and of experts taken apart.

    Where this code is not registered, or is not asked because one tower is loaded by a config of its own, transformers
    would build dense layers and leave them at random; the tripwire's shape makes it raise instead.
    """
    wires = {f"{name}.weight": layer.first.weight for name, layer in low_rank_layers(model).items()}
    for name, experts in apart_experts(model).items():
        wires[stored_expert(model, f"{name}.down_proj")] = next(experts.parameters())
    return {name: torch.zeros(1, dtype=like.dtype) for name, like in wires.items()}


def stored_expert(model: Any, name: str) -> str:
    """A name under which a dense checkpoint may hold a part of fused experts: one that makes, or is, the whole."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    for conversion in get_model_conversion_mapping(model) if conversions is None else conversions:
        if isinstance(conversion, WeightConverter):
            for target in conversion.target_patterns:
                plain = target.replace("\\", "")
                if name.endswith(plain):
                    return name.removesuffix(plain) + conversion.source_patterns[0].replace("\\", "").replace("*", "0")
    return name


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def record_ranks(model: Any, config: Any) -> None:
    """Bring the ranks in a compressed model's config up to date, by the names of its layers in the checkpoint.

    The config of each tower gets those of its own layers, by which stock transformers loads the tower alone from the
    checkpoint of the whole; and each tower a quantizer of its own, by which it can be saved alone.
    """
    layers = low_rank_layers(model)
    names = checkpoint_names(model, layers)
    config.ranks = {names[name]: layer.rank for name, layer in layers.items()}
    model.config.quantization_config = config
    for _, tower in towers_of(model):
        vars(tower.config).pop("quantization_config", None)
        vars(tower).pop("hf_quantizer", None)
    for prefix, tower in towers_of(model):
        inner = {names[name]: layer.rank for name, layer in layers.items() if name.startswith(f"{prefix}.")}
        if inner:
            others = getattr(tower.config, "quantization_config", {}).get("ranks", {})
            tower.config.quantization_config = part_config(config, prefix, {**others, **inner})
            own = AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD].from_dict(part_config(config, prefix, inner))
            tower.hf_quantizer = AUTO_QUANTIZER_MAPPING[QUANT_METHOD](own, pre_quantized=True)


def towers_of(model: Any) -> list[tuple[str, Any]]:
    """The models in a model that have a config of their own, by name."""
    inner = (
        (name, module) for name, module in model.named_modules() if isinstance(module, transformers.PreTrainedModel)
    )
    return [(name, module) for name, module in inner if module.config is not model.config]


def part_config(config: Any, tower: str, ranks: dict[str, int]) -> dict[str, Any]:
    """What a tower's config says of its compression: all that loading needs, and not how the whole was made."""
    part = {"quant_method": QUANT_METHOD, "format_version": config.format_version, "ranks": ranks, "tower": tower}
    if config.storage != "factors":
        part["storage"] = config.storage
    return part


def stock_conversions(model: Any, **options: Any) -> list[Any]:
    """What the loader does to the names in a checkpoint of a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model, **options)


def model_names(model: Any, ranks: dict, conversions: list) -> dict[str, int]:
    """Ranks by the model's own module names, which may differ from the checkpoint's.

    Translated by the loader's own renamings. Layers that this class does not have, as when only one tower of a
    checkpoint is loaded, are left out.
    """
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    dense = {
        f"{name}.weight": True for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    names = {}
    for name, rank in ranks.items():
        key = f"{name}.weight"
        renamed, _ = rename_source_key(key, renamings, [], model.base_model_prefix, dense)
        found = renamed if renamed in dense else rename_source_key(key, [], [], model.base_model_prefix, dense)[0]
        if found in dense:
            names[found.removesuffix(".weight")] = rank
    return names


def checkpoint_names(model: nn.Module, names) -> dict[str, str]:
    """The name on disk of each module, as `save_pretrained` will write it."""
    from transformers.core_model_loading import WeightRenaming

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not loaded: the stock's names, but for the prefixes of which nobody can know
        conversions = [c for c in stock_conversions(model, add_legacy=False) if type(c).__name__ != "PrefixChange"]
    renamings = [c.reverse_transform() for c in reversed(conversions) if isinstance(c, WeightRenaming)]

    def on_disk(name: str) -> str:
        key = f"{name}.weight"
        for renaming in renamings:
            key = renaming.rename_source_key(key)[0]
        return key.removesuffix(".weight")

    return {name: on_disk(name) for name in names}


def check_factors_while_loading(model: Any, ranks: dict) -> None:
    """Make the loader raise `RuntimeError` for a factor that is missing, extra or misshapen.

    Stock transformers only warns about missing and unexpected weights. The check runs where it settles which of them
    matter, before it reports them, and removes itself.
    """
    settle = model._adjust_missing_and_unexpected_keys

    def settle_and_check(loading_info):
        del model._adjust_missing_and_unexpected_keys
        settle(loading_info)
        refuse_strangers(model, ranks, loading_info.missing_keys)
        problems = factor_problems(model, loading_info)
        if problems:
            loading_info.mismatched_keys.clear()
        raise_for(problems)

    model._adjust_missing_and_unexpected_keys = settle_and_check


def refuse_strangers(model: Any, ranks: dict, missing: Iterable[str]) -> None:
    """Raise `RuntimeError` where none of a checkpoint's layers is found in a model, which would be left at random."""
    if low_rank_layers(model) or not ranks:
        return
    kinds = {tuple(name.split(".")[-2:]) for name in ranks}
    lost = [name for name in sorted(missing) if tuple(name.split(".")[-3:-1]) in kinds]
    if lost:
        raise RuntimeError(
            f"the checkpoint has compressed layers, {next(iter(ranks))} among them, and none of them is found in a "
            f"{type(model).__name__}, whose {lost[0]} and {len(lost) - 1} other weights would be left at random: the "
            "names differ, as they would from the dense model's. Load the whole model and take the tower from it, or "
            'give from_pretrained(..., key_mapping={"^prefix\\.": ""})'
        )


def raise_for(problems: list[str]) -> None:
    """Raise `RuntimeError` where a checkpoint's factors have problems."""
    if problems:
        raise RuntimeError(
            "the PGSVD checkpoint and the ranks in its config.json do not agree:\n  "
            + "\n  ".join(problems)
            + "\nThe checkpoint is damaged or was edited; save or download it again."
        )


def misshapen_factors(model: nn.Module) -> list[str]:
    """Factors that were loaded in another shape than their layer's, as transformers before 5.19 lets pass."""
    return [
        f"misshapen factor: {name}.{side}.weight is {tuple(factor.weight.shape)}, its rank asks for {expected}"
        for name, layer in low_rank_layers(model).items()
        for side, factor in layer.linears().items()
        if tuple(factor.weight.shape) != (expected := (factor.out_features, factor.in_features))
    ]


def damaged_orders(model: nn.Module) -> list[str]:
    """The orders of pivoted layers that do not name each row once."""
    return [
        f"damaged order: {name}.order does not hold each of 0 … {layer.out_features - 1} once"
        for name, layer in low_rank_layers(model).items()
        if isinstance(layer, PivotedLinear)
        and not torch.equal(layer.order.long().sort()[0], torch.arange(layer.out_features, device=layer.order.device))
    ]


def factor_problems(model: nn.Module, loading_info) -> list[str]:
    """What is wrong with the factors that were loaded, a line each."""
    factors = tuple(f"{name}." for name in low_rank_layers(model))
    suffix = re.compile(r"\.((left|right|basis|coefficients)\.(weight|bias)|order)$")
    modules = {name for name, _ in model.named_modules()}
    problems = [f"missing factor: {key}" for key in sorted(loading_info.missing_keys) if key.startswith(factors)]
    problems += [
        f"misshapen factor: {key} is {tuple(found)}, its rank asks for {tuple(expected)}"
        for key, found, expected in sorted(loading_info.mismatched_keys)
        if key.startswith(factors)
    ]
    problems += [
        f"extra factor: {key}, a layer that the config does not list"
        for key in sorted(loading_info.unexpected_keys)
        if suffix.search(key) and suffix.sub("", key) in modules
    ]
    return problems


def register(config_class=LowRankConfig, quantizer_class=LowRankQuantizer) -> None:
    """Make transformers know `quant_method: pgsvd`; the first registration in a process stays."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, config_class)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, quantizer_class)


def auto_classes(model_type: str | None) -> dict[str, list[str]]:
    """The model classes of each of transformers' auto classes for a model type."""
    from transformers.models.auto import modeling_auto

    classes = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None and model_type in mapping._model_mapping:
            found = mapping._model_mapping[model_type]
            classes[name] = [found] if isinstance(found, str) else list(found)
    return classes


def __getattr__(name: str):
    """A stock model class under this module's name, so that a checkpoint's `auto_map` can point here.

    transformers then imports this file, which registers the quantizer, and loads the model as the stock class would.
    """
    stock: Any = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    model_type = getattr(stock.config_class, "model_type", None)  # type: ignore[attr-defined]
    auto = [key for key, classes in auto_classes(model_type).items() if name in classes]
    globals()[name] = type(name, (stock,), {"__module__": __name__, "_auto_class": auto[0] if auto else "AutoModel"})
    keep_conversions(name)
    return globals()[name]


def keep_conversions(class_name: str) -> None:
    """Let a class made here load old checkpoint names as the stock class of the same name does."""
    from transformers import conversion_mapping

    known: set[str] = getattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    known.add(class_name)


if not __name__.startswith("optimum_pgsvd."):
    register()
