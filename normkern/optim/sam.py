"""sam.py: sharpness-aware minimization around any optimizer, by default of the norm layers alone (SAM-ON).

Mueller et al. 2023 (arXiv 2306.04226): perturbing only the affine parameters of the norm layers, a thousandth of a
model, is enough. Three savings follow, and are real here: the first pass computes no weight gradient of convolutions
and linear layers, the copy kept for the way back is of the perturbed parameters, and between processes only their
gradients travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from normkern.nn.affine import norm_parameters
from normkern.optim.ascent import Member, Rule, Transform, average, perturb
from normkern.running import frozen_running_stats

Perturb = Literal["norm", "no_norm", "all"] | Callable[[str, Parameter], bool]
R = TypeVar("R")


class SAM(Optimizer):
    """Sharpness-aware minimization: the base optimizer steps at w with the gradient at w + e, where e, of the set that
    `perturb` names, leads uphill (Foret et al. 2021; Kwon et al. 2021; Mueller et al. 2023, section 2):

        p = 2:      e = rho T^2 g / (||T g||_2 + 1e-16)        p = "inf":  e = rho T sign(g)

    The norm runs over the perturbed set only. T, diagonal, is by `transform`: "none" 1; "element" |w| + eta; "layer"
    ||w||_2 (1 + eta) of each tensor; "fisher" (1 + eta g^2)^(-1/2).

        optimizer = SAM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=1.0)

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # the loss at w

    or, with all that loops need (gradient accumulation, clipping, a GradScaler), pass by pass:

        with optimizer.first_pass():        # gradients of the perturbed set only
            criterion(model(x), y).backward()
        optimizer.first_step(zero_grad=True)    # to w + e
        with optimizer.second_pass():       # running statistics stay; at the end back to w, bit for bit
            criterion(model(x), y).backward()
        optimizer.second_step(zero_grad=True)   # the base optimizer's step

    Both contexts may be left out: the first pass then computes every gradient, and running statistics move twice.

    Args:
        model_or_params: the model (for several processes: as DistributedDataParallel or after fully_shard), or
            parameters, or (name, parameter) pairs, among which `perturb` chooses. Norm layers and running statistics
            can only be found in a model. Perturbed is what the base optimizer has too.
        base_optimizer: any torch.optim.Optimizer, made before. Its parameter groups and state are this optimizer's, so
            that schedulers may be given either. A group's key "rho" is its own radius, 0 for no perturbation.
        rho: radius, > 0. The best for norm layers alone is 2 to 10 times the best for a whole model.
        p: 2 or "inf".
        transform, eta: T, see above; eta >= 0.
        perturb: "norm" the affine parameters of norm layers (normkern.norm_parameters), "no_norm" all others, "all",
            or a function of a parameter's name in the model and the parameter.
        normalize_bias: False: T is 1 for parameters called "bias".
        running_stats: "freeze": they move in the first pass only (normkern.frozen_running_stats); "update": in both.
        sync_ascent: with DistributedDataParallel, True: one e for all processes, from the mean gradient; False: each
            process climbs by its own gradient (m-sharpness), and nothing is sent in the first pass.

    A first pass whose gradients are not all finite perturbs nothing; the second pass then is one at w, and what a
    GradScaler does with it is what it always does. One kernel perturbs tensors that are whole and all on one CPU or
    CUDA device, else a few torch calls do. No method waits for the device, but "fisher" with a scaler.

    Raises ValueError for arguments out of range and where nothing is left to perturb; TypeError where base_optimizer is
    no optimizer or the model is a FullyShardedDataParallel, the first of torch's two.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base_optimizer: Optimizer,
        *,
        rho: float,
        p: float | str = 2,
        transform: Transform = "none",
        eta: float = 0.0,
        perturb: Perturb = "norm",
        normalize_bias: bool = True,
        running_stats: Literal["freeze", "update"] = "freeze",
        sync_ascent: bool = True,
    ) -> None:
        if not isinstance(base_optimizer, Optimizer) or isinstance(base_optimizer, SAM):
            raise TypeError(f"SAM: base_optimizer must be a torch.optim.Optimizer; got {base_optimizer!r}")
        if not rho > 0:
            raise ValueError(f"SAM: rho must be positive; got rho={rho}")
        if p not in (2, "inf", float("inf")):
            raise ValueError(f'SAM: p must be 2 or "inf"; got p={p!r}')
        if transform not in ("none", "element", "layer", "fisher"):
            raise ValueError(f'SAM: transform must be "none", "element", "layer" or "fisher"; got {transform!r}')
        if not eta >= 0:
            raise ValueError(f"SAM: eta must not be negative; got eta={eta}")
        if perturb not in ("norm", "no_norm", "all") and not callable(perturb):
            raise ValueError(f'SAM: perturb must be "norm", "no_norm", "all" or a function; got {perturb!r}')
        if running_stats not in ("freeze", "update"):
            raise ValueError(f'SAM: running_stats must be "freeze" or "update"; got {running_stats!r}')
        # As Optimizer.__init__, but groups and state are the base optimizer's, whatever it replaces them by.
        self.base_optimizer = base_optimizer
        Optimizer.__setstate__(self, {"defaults": base_optimizer.defaults})
        self.rho, self.rule = rho, Rule(2 if p == 2 else "inf", transform, eta)
        self.perturb, self.normalize_bias = perturb, normalize_bias
        self.running_stats, self.sync_ascent = running_stats, sync_ascent
        self.model = model_or_params if isinstance(model_or_params, nn.Module) else None
        self._named = _named(model_or_params)
        if self.model is not None and any(type(m).__name__ == "FullyShardedDataParallel" for m in self.model.modules()):
            raise TypeError("SAM: FullyShardedDataParallel hides which parameters are whose; use fully_shard")
        if self.model is None and running_stats == "freeze":
            raise ValueError('SAM: running_stats="freeze" needs the model; give it, or say running_stats="update"')
        if self.model is None and perturb in ("norm", "no_norm"):
            raise ValueError(f'SAM: perturb="{perturb}" needs the model: norms are known by their modules')
        unnamed = any(not name for name in self._named.values())
        if unnamed and not normalize_bias and transform != "none":
            raise ValueError("SAM: normalize_bias=False needs a model or named parameters")
        self._chosen: set[Parameter] = set()
        self._saved: tuple[list[Tensor], list[Tensor]] | None = None  # the perturbed tensors, and what they were
        self._ascended = False  # since the last step of the base optimizer
        self._unsynchronized = False  # DistributedDataParallel left the first pass's gradients as they were
        self._choose()

    # ---- what is perturbed

    def _choose(self) -> None:
        for group in self.param_groups:
            group.setdefault("rho", self.rho)
            if not group["rho"] >= 0:
                raise ValueError(f"SAM: rho of a parameter group must not be negative; got {group['rho']}")
        norms = set(norm_parameters(self.model)) if self.model is not None else set()
        if self.perturb == "norm":
            self._chosen = norms
        elif self.perturb == "no_norm":
            self._chosen = set(self._named) - norms
        elif self.perturb == "all":
            self._chosen = set(self._named)
        else:
            self._chosen = {p for p, name in self._named.items() if self.perturb(name, p)}
        chosen = [p for p, _ in self._perturbed()]
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in chosen):
            raise ValueError("SAM: a lazy module has no parameters yet; run a batch through the model first")
        if not chosen:
            what = "norm layers" if self.perturb == "norm" else f"perturb={self.perturb!r}"
            more = "; normkern.register_norm makes a class known" if self.perturb == "norm" and not norms else ""
            raise ValueError(f"SAM: no parameters found for {what} that train and are the base optimizer's{more}")
        if not self.sync_ascent and any(_holders(p) for p in chosen):
            raise ValueError("SAM: sync_ascent=False needs whole parameters on each process; these are sharded")

    def _perturbed(self) -> Iterator[tuple[Parameter, float]]:
        """The perturbed parameters, each with its radius."""
        for group in self.param_groups:
            if group["rho"] > 0:
                for p in group["params"]:
                    if p.requires_grad and p in self._chosen:
                        yield p, group["rho"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the base optimizer; what is perturbed is chosen anew."""
        self.base_optimizer.add_param_group(param_group)
        if self.model is not None:
            self._named = _named(self.model)
        self._choose()

    # ---- the base optimizer shows through

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base_optimizer.state

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with "rho" in each group."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """One of a SAM or of the base optimizer alone."""
        self.base_optimizer.load_state_dict(state_dict)
        self._choose()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    # ---- the passes

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Inside, backward computes gradients of the perturbed set only: for the forward and backward at w."""
        self._at_rest("first_pass")
        perturbed = {p for p, _ in self._perturbed()}
        others = {p for group in self.param_groups for p in group["params"]}
        others.update(self._named)
        off = [p for p in others if p.requires_grad and p not in perturbed]
        with ExitStack() as stack:
            # Its reducer waits for every gradient, so it must not wait at all: first_step() averages the few there are.
            if off or not self.sync_ascent:
                for replica in self._replicas():
                    stack.enter_context(replica.no_sync())
                    self._unsynchronized = True
            for p in off:
                p.requires_grad_(False)
            try:
                yield
            finally:
                for p in off:
                    p.requires_grad_(True)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, scaler: Any = None) -> None:
        """From w to w + e, by the gradients that are there; a copy of the perturbed set is kept.

        scaler: the torch.amp.GradScaler that scaled the loss; only transform="fisher" depends on it.

        Raises RuntimeError where no perturbed parameter has a gradient or one has a sparse gradient.
        """
        self._at_rest("first_step")
        members = self._members()
        grad_scale = scaler.get_scale() if scaler is not None and self.rule.transform == "fisher" else 1.0
        self._saved = perturb(members, self.rule, grad_scale)
        self._ascended = True
        if zero_grad:
            self.zero_grad()

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """For the forward and backward at w + e. Running statistics stay as they are (running_stats="freeze"), and when
        the block ends, also by an exception, the weights are w again."""
        if self._saved is None:
            raise RuntimeError("SAM.second_pass: the weights are not perturbed; call first_step first")
        try:
            with ExitStack() as stack:
                if self.running_stats == "freeze" and self.model is not None:
                    stack.enter_context(frozen_running_stats(self.model))
                yield
        finally:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Back to w, bit for bit; nothing happens where the weights are w."""
        if self._saved is not None:
            weights, copies = self._saved
            torch._foreach_copy_(weights, copies)
            self._saved = None

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Back to w, unless second_pass() did it, and the base optimizer's step with the gradients that are there.

        Raises RuntimeError where first_step() was not called, or there is no gradient.
        """
        if not self._ascended:
            raise RuntimeError("SAM.second_step: no ascent was made; call first_step first")
        self.restore()
        self._ascended = False
        self._need_gradients("second_step", (p for group in self.param_groups for p in group["params"]))
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], R] | None = None, *, scaler: Any = None) -> R | None:  # type: ignore[override]
        """A whole step. The closure, called twice, zeroes the gradients, computes the loss, calls backward and returns
        whatever it likes; that of the first call, made at w, is returned.

        scaler: the torch.amp.GradScaler that scales the loss in the closure; the base optimizer then steps through it,
            and its update() is left to the caller.

        Without a closure, as a GradScaler calls it: second_step().

        Raises RuntimeError where the closure leaves no gradient behind, or there is no closure and no ascent was made.
        """
        if closure is None:
            if not self._ascended:
                raise RuntimeError("SAM.step: give it a closure, or call first_step before")
            self.second_step()
            return None
        self._forget()  # of the last step, which a closure that does not call backward would leave
        with torch.enable_grad(), self.first_pass():
            result = closure()
        self.first_step(scaler=scaler)
        self._forget()
        with torch.enable_grad(), self.second_pass():
            closure()
        self._need_gradients("step", (p for p, _ in self._perturbed()))
        self._ascended = False
        if scaler is None:
            self.base_optimizer.step()
        else:
            scaler.step(self.base_optimizer)
        return result

    # ---- parts of the above

    def _at_rest(self, method: str) -> None:
        if self._saved is not None:
            raise RuntimeError(f"SAM.{method}: the weights are perturbed; call second_step, or restore, first")

    def _forget(self) -> None:
        for p, _ in self._perturbed():
            p.grad = None

    def _need_gradients(self, method: str, parameters: Iterable[Tensor]) -> None:
        if all(p.grad is None for p in parameters):
            self._ascended = False
            raise RuntimeError(f"SAM.{method}: no parameter has a gradient; backward must run before it")

    def _replicas(self) -> list[nn.parallel.DistributedDataParallel]:
        modules = self.model.modules() if self.model is not None else ()
        return [m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)]

    def _members(self) -> list[Member]:
        pairs = list(self._perturbed())
        self._need_gradients("first_step", (p for p, _ in pairs))
        for p, _ in pairs:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"SAM.first_step: gradients must be dense; got {p.grad.layout} for {self._named.get(p) or 'one'}"
                )
        gradients = {p: p.grad for p, _ in pairs if p.grad is not None}
        if self._unsynchronized and self.sync_ascent:
            for replica in self._replicas():
                # Every process sends the same tensors, also where its own batch did not touch one.
                held = set(replica.parameters())
                own = [p for p, _ in pairs if p in held]
                sent = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
                gradients.update(zip(own, average(sent, replica.process_group), strict=True))
        self._unsynchronized = False
        members = []
        for p, rho in pairs:
            if p in gradients:
                transformed = self.normalize_bias or self._named.get(p, "").rpartition(".")[2] != "bias"
                weight, grad = _local(p, gradients[p])
                members.append(Member(weight, grad, rho, transformed, p.numel(), _holders(p)))
        return members


def _named(model_or_params: nn.Module | Iterable[Any]) -> dict[Parameter, str]:
    if isinstance(model_or_params, nn.Module):
        return {p: name for name, p in model_or_params.named_parameters()}
    if isinstance(model_or_params, Tensor):
        raise TypeError("SAM: model_or_params must be a model or parameters; got a Tensor")
    named = {}
    for item in model_or_params:
        name, p = item if isinstance(item, tuple) else ("", item)
        if not isinstance(p, Tensor):
            raise TypeError(
                f"SAM: model_or_params must be a model or an iterable of parameters; got {type(p).__name__}"
            )
        named[p] = name
    return named  # type: ignore[return-value]


def _sharded(p: Tensor) -> bool:
    return hasattr(p, "placements")


def _holders(p: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The processes that hold parts of a DTensor, by dimensions of its mesh; none for a tensor that is whole."""
    if not _sharded(p):
        return ()
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(i) for i, placement in enumerate(placements) if not placement.is_replicate())


def _local(p: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """This process's part of both."""
    if not _sharded(p):
        return p, grad
    return p.to_local(), grad.redistribute(p.device_mesh, p.placements).to_local()  # type: ignore[attr-defined]
