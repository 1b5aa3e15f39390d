"""A model's anchors by parameter name: making, saving and loading them, and checking a model against them."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from .. import ops
from ..checks import dtype_name
from ..distributed import LocalWeight, ParameterRef, assign_shards, find_parameters
from ..distributed.partition import Layout
from ..low_rank.started import At
from .adapted import count_starts, locate_pretrained, start_adapters
from .anchor import Anchor
from .build import build_anchors
from .file_format import Contents, write_anchors
from .fingerprint import Fingerprint
from .left_out import describe_left_out
from .load import read_anchors
from .make import AnchorOptions, Subspace
from .memory import AnchorMemory, anchor_memory, format_bytes
from .save import save_sharded
from .select import Patterns, select_weights
from .summary import describe_control, table
from .ties import check_ties, find_broken_ties
from .together import Refusals, find_groups, recall_groups, refuse_together, remember_groups
from .verify import Comparison


class Anchors(Mapping[str, Anchor]):
    """Anchors by canonical parameter name (wrapper prefixes such as ``_orig_mod`` left out). Immutable.

    Args:
        anchors: A non-empty mapping of names to anchors.
        fingerprints: The anchored weights' fingerprints by name, where they are known; :meth:`verify` needs them.
        skipped: Parameters without an anchor, with the reason.

    Raises:
        ValueError: ``anchors`` is empty or holds anything but anchors, or a fingerprint belongs to none
            of them.
    """

    def __init__(
        self,
        anchors: Mapping[str, Anchor],
        *,
        fingerprints: Mapping[str, Fingerprint] | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(anchors, Mapping):
            raise ValueError(f"anchors: got {type(anchors).__name__}, expected a mapping of names to Anchor")
        if not anchors:
            raise ValueError(
                "anchors: got an empty mapping, expected at least one Anchor: anchors for nothing regularise nothing"
            )
        for name, anchor in anchors.items():
            if not isinstance(name, str) or not isinstance(anchor, Anchor):
                raise ValueError(f"anchors[{name!r}]: got {type(anchor).__name__}, expected an Anchor under a str name")
        self._anchors = dict(anchors)
        self._fingerprints = dict(fingerprints or {})
        self._skipped = dict(skipped or {})
        for name, fingerprint in self._fingerprints.items():
            owner = self._anchors.get(name)
            described = (fingerprint.name, fingerprint.shape, fingerprint.dtype)
            if owner is None or described != (name, owner.shape, dtype_name(owner.weight_dtype)):
                raise ValueError(f"fingerprints[{name!r}]: got {fingerprint}, expected that of the weight of {owner}")

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        rank: int | float,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        keep_base: bool | None = None,
        basis_dtype: torch.dtype = torch.bfloat16,
        progress: bool = True,
        subspace: Subspace = "singular",
        seed: int = 0,
        at: At = "base",
    ) -> Anchors:
        """Make anchors for every 2-D floating point parameter of a pretrained model, each on its own device.

        If the model is sharded or replicated over processes, every rank makes this call and gets anchors of the shards
        that it works on: with FSDP2 and tensor parallelism (DTensor), FSDP1 and DeepSpeed ZeRO-3 its shard of each
        weight, with DistributedDataParallel and DeepSpeed ZeRO-1/2 its share of the weights that these keep equal. Each
        weight is gathered once, on one rank, for its singular subspaces.

        Args:
            model: The model before fine-tuning. Frozen parameters are anchored too. Of a model with PEFT's adapters
                (LoRA and its relatives; see the docs) the weights below them are anchored, under the names that the
                plain model has for them, and the originals of ``modules_to_save``; what is frozen and has no adapter
                stands still, and is skipped. One file of anchors serves the plain, the adapted and the merged model.
            rank: k (the paper's 768); weights with min(m, n) <= k get a full anchor. A float strictly between 0 and 1
                is a share of energy: each weight gets the smallest k whose directions hold this share of ||W0||_F^2, a
                full anchor where that takes min(m, n).
            include: A glob or globs over full canonical names (``fnmatch``, case-sensitive); None takes
                every parameter.
            exclude: A glob or globs of parameters to leave out; outranks ``include``.
            keep_base: As for :meth:`Anchor.from_weight`; None is True but for weights with adapters, whose penalty
                needs no W0.
            basis_dtype: As for :meth:`Anchor.from_weight`.
            progress: Whether to draw a progress bar on stderr.
            subspace: ``"singular"``, or ``"random"``: orthonormal U and V drawn at random in place of the singular
                vectors, with the same ranks and forms. That is a control for experiments, not RPSFT: it tells how much
                of an effect the choice of directions has. Files, ``summary()`` and ``repr`` say so.
            seed: Of random subspaces; with a weight's name and shape it determines them, wherever the weight lies. Not
                used for singular ones.
            at: Of a model with adapters: ``"base"`` takes the weights below them for W0, so that what adapters hold
                already counts as drift (a training that goes on). ``"now"`` takes the weights that the model computes
                with now, and keeps the adapters' values for that: needed where PEFT has taken the adapters out of the
                base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ). Not used for other models.

        Tied parameters are anchored once, under their first name; a glob that matches any of their names has
        matched them. :attr:`skipped` has the parameters that were not anchored, with the reason. Among them is what is
        no weight of its own, whatever its shape: packed 4-bit values, scales and zero points, parts and bases of PEFT's
        adapters, and parametrised weights (weight_norm, spectral_norm, pruning), whose effective weight is not a
        parameter. :meth:`Anchor.from_weight` anchors any tensor that you know to be a weight all the same.

        Where a fifth or more of the elements of floating-point parameters of two or more dimensions gets no anchor
        though no glob leaves it out (experts as 3-D parameters, for example), a UserWarning names the largest, with
        their shares.

        Raises:
            ValueError: a glob matches no parameter; nothing is left to anchor; a weight is on the meta device or not
                finite (the message names it), or sharded in a way that is not known; or an argument is invalid.
        """
        groups = find_groups(model)
        with refuse_together(groups, "no anchor was made"):
            options = AnchorOptions(rank, keep_base is not False, basis_dtype, subspace, seed)
            selection = select_weights(model, include, exclude)
            left_out = describe_left_out(selection)
            if left_out is not None:
                warnings.warn(left_out, UserWarning, stacklevel=2)
            starts, chosen = start_adapters(model, selection.adapted, at)
            chosen = {name: chosen.get(name, weight) for name, weight in selection.chosen.items()}
            weights = assign_shards(chosen, options.planned_ranks(chosen), options.without_base(chosen))
        built: dict[str, tuple[Anchor, Fingerprint]] = {}
        building = _build(weights, options, groups, selection.adapted if keep_base is None else frozenset())
        for name, anchor, fingerprint in tqdm(building, "anchoring", len(weights), unit="weight", disable=not progress):
            if starts.get(name):
                anchor = dataclasses.replace(anchor, starts=starts[name])
            built[name] = anchor, fingerprint
        # Anchors come in the model's order, in whatever order they were built.
        made = cls(
            {name: built[name][0] for name in weights},
            fingerprints={name: built[name][1] for name in weights},
            skipped=selection.skipped,
        )
        remember_groups(made, groups)
        return made

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        device: torch.device | str = "cpu",
        verify: bool = True,
    ) -> Anchors:
        """Read the file or folder that :meth:`save` wrote, however many ranks wrote it.

        Args:
            path: The file, or the folder that ranks of a sharded model have written.
            model: The pretrained model, if at hand: it is verified (:meth:`verify`), and blocks that another
                backend or sharding computed are rebuilt (:meth:`rebuilt`). If it is sharded or replicated over
                processes, all ranks make this call, and each reads the anchors of its shards alone.
            device: Where the anchors go.
            verify: False for a ``model`` that has been trained since: it then tells only which shards to read.

        Raises:
            ValueError: the file is not one of ours, of another version, incomplete, damaged or not finite (the message
                names file and weight), ``model`` is not the model that was anchored, or blocks would have to be
                rebuilt for another sharding without the pretrained weights.
            FileNotFoundError: there is no such file. What one rank raises, its other ranks raise as a ValueError.
        """

        def locate(anchor_ranks: Mapping[str, int], without_base: Collection[str]) -> Mapping[str, LocalWeight]:
            assert model is not None
            return assign_shards(locate_pretrained(model, anchor_ranks), anchor_ranks, without_base)

        groups = {} if model is None else find_groups(model)
        with refuse_together(groups, "path: the anchors were not loaded"):
            contents = read_anchors(path, device, None if model is None else locate)
            try:
                anchors = cls(contents.anchors, fingerprints=contents.fingerprints, skipped=contents.skipped)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from error
            if model is None or not verify:
                anchors._check_blocks(path)
        remember_groups(anchors, groups)
        return anchors if model is None or not verify else anchors.rebuilt(model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all; an existing file is replaced, a symbolic link followed.

        Anchors of shards (from a model that lies over several ranks) go to a folder instead, which all ranks of the job
        write together: a file per rank and an index. Any number of ranks can load it.

        Raises:
            ValueError: the folder of ``path`` does not exist, or ``path`` is a folder (for anchors of shards: a file),
                a device or a pipe, or (for anchors of shards) a rank could not write.
            OSError: the file could not be written, for want of space for example; the file that was there remains.
        """
        contents = Contents(self._anchors, self._fingerprints, self._skipped)
        if any(anchor.part is not None for anchor in self._anchors.values()):
            save_sharded(path, contents)
        else:
            write_anchors(path, contents)

    @staticmethod
    def memory(
        model: nn.Module,
        rank: int | float,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        keep_base: bool | None = None,
        basis_dtype: torch.dtype = torch.bfloat16,
        ranks: int | None = None,
        layout: Layout = "shard0",
        at: At = "base",
    ) -> AnchorMemory:
        """Count the bytes of the anchors that :meth:`from_model` would make, before anything is allocated.

        Args:
            model: As for :meth:`from_model`; the meta device serves.
            rank, include, exclude, keep_base, basis_dtype: As for :meth:`from_model`.
            ranks: How many ranks to plan for; None takes the model as it lies now, for this rank alone.
            layout: The planned layout: ``"shard0"`` (FSDP2: rows), ``"replicated"`` (DDP, ZeRO-1/2) or ``"flat"``
                (FSDP1, ZeRO-3).
            at: As for :meth:`from_model`.

        A base is counted in bfloat16 for bfloat16 weights, else in the weights' own dtype, though it is kept in
        bfloat16 where that turns out to be exact. For a share of energy it counts the most bytes that any weights of
        these shapes could take, because only their singular values tell the ranks: ``at_most`` is True then.

        Raises:
            ValueError: as :meth:`from_model`; ``ranks`` is less than 1, or there is no such layout.
        """
        options = AnchorOptions(rank, keep_base is not False, basis_dtype)
        selection = select_weights(model, include, exclude)
        without_base = selection.adapted if keep_base is None else frozenset()
        return anchor_memory(
            selection.chosen,
            options,
            world_size=ranks,
            layout=layout,
            without_base=without_base,
            starts=count_starts(model, selection.adapted, at),
        )

    def verify(self, model: nn.Module) -> None:
        """Check that ``model`` holds the very weights that were anchored, bit for bit.

        Raises:
            ValueError: lists every anchored weight that the model lacks or has in another shape or dtype or
                with other values, or whose fingerprint was never taken (anchors that were built by hand); and
                every parameter that was tied to an anchored one and is not now, or the other way round. What one
                of several ranks finds, all of them raise.
        """
        # Without a model every rank that knows these anchors' groups refuses, and those who wait there are told.
        groups = find_groups(model) if isinstance(model, nn.Module) else recall_groups(self)
        refusals = Refusals("the weights were not verified")
        with refusals.keep():
            comparison = Comparison(self._anchors, self._fingerprints, _locate_anchored(self._anchors, model))
            ties = find_broken_ties(self._anchors, self._skipped, find_parameters(model))
        refusals.tell_all(groups)
        problems = comparison.find_differences(groups) + ties
        with refusals.keep():
            if problems:
                listed = "\n  ".join(problems)
                raise ValueError(
                    f"model: {len(problems)} of {len(self)} weights are not those that were anchored, expected "
                    "the pretrained checkpoint of these anchors. Has this one been trained since, as on resume, load "
                    "them without it (Anchors.load(path)), or with verify=False where it lies over several ranks; to "
                    "anchor it anew would restart R at 0. Only another pretrained model needs anchors of its own "
                    f"(Anchors.from_model):\n  {listed}"
                )
        refusals.tell_all(groups)

    def rebuilt(self, model: nn.Module) -> Anchors:
        """Return these anchors with every block recomputed that another arithmetic than ``model``'s has made.

        Args:
            model: The pretrained model, on the devices it will be trained on.

        Raises:
            ValueError: as :meth:`verify`.
        """
        self.verify(model)
        anchors = dict(self._anchors)
        with refuse_together(find_groups(model), "no block was rebuilt"):
            weights = _locate_anchored(self._anchors, model)
            for name, anchor in self._anchors.items():
                if anchor.form != "block" or not anchor.held.numel:
                    continue
                weight = weights[name]
                backend = ops.resolve_backend(weight.device, weight.dtype)
                if anchor.arithmetic != ops.arithmetic_id(backend, weight.device, weight.dtype):
                    values = weight.values().detach()
                    anchors[name] = anchor.to(weight.device).rebuilt_block(values).to(anchor.device)
        return self._with(anchors)

    def to(self, device: torch.device | str) -> Anchors:
        """Return the same anchors on ``device``; blocks stay as computed, see :meth:`rebuilt`."""
        return self._with({name: anchor.to(device) for name, anchor in self._anchors.items()})

    @property
    def skipped(self) -> Mapping[str, str]:
        """Parameters that have no anchor, with the reason."""
        return MappingProxyType(self._skipped)

    @property
    def fingerprints(self) -> Mapping[str, Fingerprint]:
        """The anchored weights' fingerprints by name; empty for anchors that were built by hand."""
        return MappingProxyType(self._fingerprints)

    @property
    def nbytes(self) -> int:
        """Bytes of all anchors."""
        return sum(anchor.nbytes for anchor in self._anchors.values())

    def summary(self) -> str:
        """Write a table by form: weights, bytes and captured energy; then the skipped parameters by reason."""
        return table(self._anchors, self._skipped)

    def __getitem__(self, name: str) -> Anchor:
        return self._anchors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._anchors)

    def __len__(self) -> int:
        return len(self._anchors)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        forms = [anchor.form for anchor in self._anchors.values()]
        counts = ", ".join(f"{forms.count(f)} {f}" for f in ("base", "block", "full") if f in forms)
        devices = ", ".join(sorted({str(anchor.device) for anchor in self._anchors.values()}))
        control = describe_control(self._anchors)
        subspaces = f"; subspaces: {control}" if control else ""
        return f"Anchors({counts}; {len(self._skipped)} skipped; {format_bytes(self.nbytes)} on {devices}{subspaces})"

    def _check_blocks(self, path: str | os.PathLike[str]) -> None:
        """Raise a ValueError where a block that was read is not that of the shard at hand."""
        for name, anchor in self.items():
            if anchor.part is not None and anchor.block is not None and anchor.block.numel() and not anchor.arithmetic:
                raise ValueError(
                    f"{os.fspath(path)}: {name}: got a block of another sharding, expected that of {anchor.part}: only "
                    "the pretrained weights give it: load it with the pretrained model (verify=True), or on as "
                    "many ranks as it was saved on"
                )

    def _with(self, anchors: Mapping[str, Anchor]) -> Anchors:
        changed = Anchors(anchors, fingerprints=self._fingerprints, skipped=self._skipped)
        remember_groups(changed, recall_groups(self))
        return changed


def check_ties_of(anchors: Mapping[str, Anchor], parameters: Mapping[str, ParameterRef]) -> None:
    """Raise a ValueError if a model's parameters are tied otherwise than when these anchors were made.

    A mapping that was put together by hand knows of no ties.
    """
    if isinstance(anchors, Anchors):
        # The plain dictionary, because torch.compile of torch 2.6 traces no proxies of one.
        check_ties(anchors._anchors, anchors._skipped, parameters)


def _locate_anchored(anchors: Mapping[str, Anchor], model: nn.Module) -> dict[str, LocalWeight]:
    """Find the anchored weights that the model has, as they lie here; replicated ones get their anchors' shards."""
    located = locate_pretrained(model, anchors, anchors)
    return {name: weight.with_work(anchors[name].part) for name, weight in located.items()}


def _build(
    weights: Mapping[str, LocalWeight],
    options: AnchorOptions,
    groups: Mapping[str, dist.ProcessGroup],
    without_base: Collection[str],
) -> Iterator[tuple[str, Anchor, Fingerprint]]:
    """Build the anchors; those of weights ``without_base`` in block form, after the others."""
    for names, keep_base in ((weights.keys() - set(without_base), options.keep_base), (set(without_base), False)):
        # Also where there are none here: other ranks may have some, and tell this one what they refuse.
        members = {name: weight for name, weight in weights.items() if name in names}
        yield from build_anchors(members, dataclasses.replace(options, keep_base=keep_base), groups)
