"""A decoder's forward pass on the device, all of it in memory that is taken once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.cuda.dense_attention import DenseRun, dense_attention
from services.worker.cuda.kv_cache import DeviceKvCache
from services.worker.cuda.matrix import DeviceMatrix, Multiplier, PartsReader
from services.worker.cuda.ranks import DeviceRanks
from services.worker.cuda.step_inputs import StepInputs, StepSizes, decode_batch, num_shared_pieces_for
from services.worker.cuda.weights import DeviceWeights
from services.worker.kernels.choose_token import PartResults, RankPart, choose_likeliest, part_results
from services.worker.kernels.decode_attention import (
    INVARIANT_PIECE_TOKENS,
    INVARIANT_TUNING,
    decode_attention,
    num_pieces_for,
    piece_results,
)
from services.worker.kernels.embedding import embed
from services.worker.kernels.gemv import gemv_swiglu
from services.worker.kernels.gemv_rope import gemv_rope
from services.worker.kernels.norm import add_rms_norm
from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.peers import Seat
from services.worker.kernels.prefill_attention import prefill_attention
from services.worker.kernels.rope_kv import HeadWeights, rope_and_write
from services.worker.kernels.round_rows import round_rows_into
from services.worker.kernels.rows import FP8, Rows, Scaled
from services.worker.kernels.shared_attention import shared_attention, shared_results
from services.worker.kernels.small_product import small_product_swiglu
from services.worker.kernels.swiglu import swiglu
from services.worker.kernels.tile_product import product_swiglu, tile_product
from services.worker.runner.models.decoder_weights import DecoderConfig, DecoderLayerWeights
from services.worker.runner.models.shard import Shard
from services.worker.runner.rope import rotary_table


@dataclass(frozen=True, slots=True)
class MostWork:
    """The largest step that there is room for."""

    num_rows: int
    num_sequences: int
    num_places: int
    """Sequences whose last tokens are kept."""
    context_tokens: int
    """Of a sequence."""


class DeviceDecoder:
    """A rank's part of a decoder, and the room that its steps work in. A step leaves its results there."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DeviceWeights,
        shard: Shard,
        most: MostWork,
        kind: torch.dtype,
        ranks: DeviceRanks | None = None,
        *,
        is_batch_invariant: bool = False,
    ) -> None:
        """`config` is the whole model's; `kind` is the activations' type; `ranks`: None if this is the only one.

        `is_batch_invariant`: a row's result does not depend on the rows beside it, to the last bit.
        """
        assert (shard.world_size == 1) == (ranks is None)
        self.config = shard.config(config)
        self._weights = weights
        self._tokens_here = shard.vocabulary(config)
        self.ranks = ranks
        is_fp8 = weights.layers[0].qkv_proj.channel_scales is not None
        self._device = weights.embedding.device
        turns = rotary_table(config.context_tokens, weights.rotary_frequencies.cpu()).to(self._device)
        self._heads = [
            HeadWeights(turns, layer.qkv_proj.bias, layer.qk_norm, config.rms_norm_eps) for layer in weights.layers
        ]
        self._computed_layers: Sequence[int] = range(config.num_layers)
        self.is_batch_invariant = is_batch_invariant
        self._room = _Room(
            self.config,
            most,
            kind,
            self._device,
            len(self._tokens_here),
            is_fp8=is_fp8,
            is_batch_invariant=is_batch_invariant,
        )
        self._multiplier = Multiplier(
            config.hidden_size, self._room.qkv.shape[1], self._device, is_batch_invariant=is_batch_invariant
        )
        may_choose = self._device.type == "cuda" and not is_batch_invariant
        self.may_be_dense = may_choose and kind != torch.float32 and config.sliding_window is None
        """Whether whole prompts may be attended by cuDNN."""
        self._beside = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        """Where prompts are attended while decodes are."""
        self.last_tokens = torch.zeros(most.num_places, dtype=torch.int32, device=self._device)
        """The token that was sampled last at each place."""
        self.tokens = torch.zeros(most.num_sequences, dtype=torch.int32, device=self._device)
        """The step's sampled tokens, in the order of `sample_rows`."""

    @property
    def choices(self) -> PartResults:
        """What choosing the likeliest tokens left for drawing others."""
        return self._room.choices

    @property
    def normed(self) -> Tensor:
        """Every row's last hidden state, if the last step's sizes said `keeps_all_rows`: [most rows, hidden_size]."""
        return self._room.normed

    def logits_of(self, num_samples: int) -> Tensor:
        """Logits of the step's samples: [num_samples, vocabulary_size], of several ranks this one's part."""
        return self._room.logits[:num_samples]

    @contextmanager
    def with_few_layers(self) -> Iterator[None]:
        """In here a step computes two layers, and one of each kind: every kernel, but a fraction of the launches.

        The first one is no other's like: its norm adds nothing to the residual.
        """
        windowed, layers = self.config.sliding_layers, range(self.config.num_layers)
        kinds = {index in windowed: index for index in reversed(layers)}
        self._computed_layers = sorted({*layers[:2], *kinds.values()})
        try:
            yield
        finally:
            self._computed_layers = layers

    def attend(self, step: StepInputs[Tensor], sizes: StepSizes, cache: DeviceKvCache, *, pdl: bool) -> None:
        """Compute a step up to the last layer's attention: all of its keys and values. It looks at no samples.

        `pdl`: kernels begin before those in front have ended; it helps where a kernel takes a few microseconds, and
        harms where it takes more.
        """
        room, config, num_rows = self._room, self.config, sizes.num_rows
        residual = room.residual[:num_rows]
        delta = self._embed(step, residual, pdl)
        for index in self._computed_layers:
            layer, heads, kv = self._weights.layers[index], self._heads[index], cache.layers[index]
            window = config.sliding_window if index in config.sliding_layers else None
            normed = self._normed(delta, residual, layer.attention_norm, layer.qkv_proj, pdl)
            queries = room.queries[:num_rows]
            if self._multiplier.may_turn(normed, heads):
                scales = layer.qkv_proj.channel_scales
                values, weight = normed.values, layer.qkv_proj.values
                gemv_rope(values, weight, scales, heads, step.positions, step.slots, kv, queries, pdl=pdl)
            else:
                qkv = self._multiply(normed, layer.qkv_proj, room.qkv, pdl, parts_for="rope")
                rope_and_write(
                    qkv, heads, step.positions, step.slots, kv, queries, keeps_dense=bool(sizes.dense_runs), pdl=pdl
                )
            attended = self._attended(queries, step, sizes, kv, window)
            if layer is not self._weights.layers[-1]:
                # What waits for two kernels in front cannot begin before they have ended.
                delta = self._behind_attention(layer, attended, residual, pdl, overlaps=pdl and not sizes.has_both)
        if sizes.is_one_run:
            room.attended[:num_rows].copy_(attended)

    def choose(self, step: StepInputs[Tensor], sizes: StepSizes, *, pdl: bool) -> None:
        """Compute the rest of a step, of no rows but those that are sampled or kept, and the likeliest token after each
        row that is sampled."""
        if sizes.num_samples == 0 and not sizes.keeps_all_rows:
            return
        room, last = self._room, self._weights.layers[-1]
        attended, residual = room.attended[: sizes.num_rows], room.residual[: sizes.num_rows]
        if not sizes.keeps_all_rows:
            attended, residual = self._only_sampled(attended, residual, step, sizes)
        # Where only some rows are sampled, what picks them has waited for both kinds of attention.
        waits_for_both = sizes.has_both and len(residual) == sizes.num_rows
        delta = self._behind_attention(last, attended, residual, pdl, overlaps=pdl and not waits_for_both)
        final = Rows(room.normed[: len(residual)])
        self._norm(delta, residual, self._weights.norm, final, pdl)
        if sizes.num_samples == 0:
            return
        if sizes.keeps_all_rows:
            final = Rows(torch.index_select(final.values, 0, step.sample_rows, out=room.sampled[: sizes.num_samples]))
        logits = self.logits_of(sizes.num_samples)
        self._multiply(final, self._weights.lm_head, logits, pdl)
        part = RankPart(self._tokens_here.start, final.values, self.ranks.choices) if self.ranks else None
        choose_likeliest(logits, room.choices, step.sample_places, self.tokens, self.last_tokens, part, pdl=pdl)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map last hidden states, [num_rows, hidden_size], to whole logits in memory of their own."""
        weight = self._weights.lm_head.values
        if self.is_batch_invariant:
            logits = torch.empty((len(hidden), len(weight)), dtype=hidden.dtype, device=hidden.device)
            tile_product(hidden, weight, logits)
        else:
            logits = hidden @ weight.T
        return self.ranks.whole(logits) if self.ranks else logits

    def _embed(self, step: StepInputs[Tensor], residual: Tensor, pdl: bool) -> Scaled | None:
        """Begin the residual; of several ranks with zeros, to which the first norm adds what each has of the rows."""
        embedding, first_token = self._weights.embedding, self._tokens_here.start
        if self.ranks is None:
            embed(step.token_ids, step.places, self.last_tokens, embedding, residual, pdl=pdl)
            return None
        part = self._room.hidden[: len(residual)]
        embed(step.token_ids, step.places, self.last_tokens, embedding, part, first_token, residual, pdl=pdl)
        return self._over_ranks(Scaled(part), pdl)

    def _norm(self, delta: Scaled | None, residual: Tensor, weight: Tensor, out: Rows, pdl: bool) -> None:
        """Add to the residual, over ranks if they have not done so by themselves, and norm it."""
        add_rms_norm(delta, residual, weight, self.config.rms_norm_eps, out, self._seat(len(residual)), pdl=pdl)

    def _seat(self, num_rows: int) -> Seat | None:
        """Where norms sum so many rows over ranks; None: they do not."""
        return self.ranks.sums if self.ranks and self.ranks.are_few(num_rows) else None

    def _over_ranks(self, part: Scaled, pdl: bool) -> Scaled:
        """What a rank has of a sum: of few rows as it is, for the norm to add up."""
        num_rows = part.product.shape[-2]
        return self.ranks.sum(part, pdl=pdl) if self.ranks and not self.ranks.are_few(num_rows) else part

    def _only_sampled(
        self, attended: Tensor, residual: Tensor, step: StepInputs[Tensor], sizes: StepSizes
    ) -> tuple[Tensor, Tensor]:
        """Leave, behind the last layer's attention, the rows that a token is chosen after: no other is read again."""
        if sizes.num_decodes == sizes.num_rows == sizes.num_samples:
            return attended, residual
        room = self._room
        return (
            torch.index_select(attended, 0, step.sample_rows, out=room.sampled_attended[: sizes.num_samples]),
            torch.index_select(residual, 0, step.sample_rows, out=room.sampled[: sizes.num_samples]),
        )

    def _behind_attention(
        self, layer: DecoderLayerWeights[DeviceMatrix], attended: Tensor, residual: Tensor, pdl: bool, *, overlaps: bool
    ) -> Scaled | None:
        """What is left of a layer; returns what the next norm adds to the residual, if anything.

        `overlaps`: whether its first kernel begins before attention has ended.
        """
        rows = self._rounded(attended, layer.o_proj, overlaps)
        delta = self._back(rows, layer.o_proj, residual, overlaps if rows.scales is None else pdl)
        normed = self._normed(delta, residual, layer.mlp_norm, layer.gate_up_proj, pdl)
        return self._back(self._activate(normed, layer, pdl), layer.down_proj, residual, pdl)

    def _normed(self, delta: Scaled | None, residual: Tensor, weight: Tensor, then: DeviceMatrix, pdl: bool) -> Rows:
        """Add to the residual, and norm it for a product."""
        room, num_rows = self._room, len(residual)
        normed = room.rows(room.normed, room.normed_fp8, num_rows, self._multiplier.wants_fp8(then, num_rows))
        self._norm(delta, residual, weight, normed, pdl)
        return normed

    def _rounded(self, attended: Tensor, then: DeviceMatrix, pdl: bool) -> Rows:
        """What attention gave, for a product."""
        room, num_rows = self._room, len(attended)
        if not self._multiplier.wants_fp8(then, num_rows):
            return Rows(attended)
        rounded = room.rows(room.attended, room.attended_fp8, num_rows, True)
        round_rows_into(attended, rounded, pdl=pdl)
        return rounded

    def _activate(self, normed: Rows, layer: DecoderLayerWeights[DeviceMatrix], pdl: bool) -> Rows:
        """The first product of the MLP, and SwiGLU."""
        room, num_rows, matrix = self._room, len(normed.values), layer.gate_up_proj
        to_fp8 = self._multiplier.wants_fp8(layer.down_proj, num_rows)
        activated = room.rows(room.activated, room.activated_fp8, num_rows, to_fp8)
        how = self._multiplier.how_to_activate(normed, matrix, to_fp8=to_fp8)
        if how == "gemv":
            gemv_swiglu(normed.values, matrix.values, matrix.channel_scales, activated.values, pdl=pdl)
        elif how == "tiles":
            product_swiglu(normed.values, matrix.values, activated.values, pdl=pdl)
        elif how == "apart":
            swiglu(self._multiply(normed, matrix, room.gate_up, pdl), activated, pdl=pdl)
        else:
            plain = Rows(room.activated[:num_rows])
            small_product_swiglu(normed, matrix.values, matrix.channel_scales, plain.values, how, pdl=pdl)
            if to_fp8:
                round_rows_into(plain.values, activated, pdl=pdl)
        return activated

    def _back(self, rows: Rows, matrix: DeviceMatrix, residual: Tensor, pdl: bool) -> Scaled | None:
        """A product that leads back to the residual: summed over ranks, and by the norm over its parts; None: it is
        added already."""
        if self.ranks is None and self._multiplier.may_add(rows, matrix):
            self._multiplier.add(rows, matrix, residual)
            return None
        seat, out = self._seat(len(rows.values)), self._room.hidden[: len(rows.values)]
        parts_for: PartsReader | None = "norm" if self.ranks is None or seat is not None else None
        return self._over_ranks(self._multiplier(rows, matrix, out, parts_for=parts_for, pdl=pdl, seat=seat), pdl)

    def _multiply(
        self, rows: Rows, matrix: DeviceMatrix, out: Tensor, pdl: bool, parts_for: PartsReader | None = None
    ) -> Scaled:
        return self._multiplier(rows, matrix, out[: len(rows.values)], parts_for=parts_for, pdl=pdl)

    def _attended(
        self,
        queries: Tensor,
        step: StepInputs[Tensor],
        sizes: StepSizes,
        kv: PagedLayer,
        window: int | None,
    ) -> Tensor:
        """Returns [num_rows, q_size]; in the room, but for a step that is one run for cuDNN.

        Decodes are bound by bytes, prompts by operations or, if they are few, by waiting: so both at once.
        """
        if sizes.is_one_run:
            return self._attend_densely(queries, sizes.dense_runs[0]).flatten(1)
        attended = self._room.attended[: sizes.num_rows]
        by_head = attended.view(queries.shape)
        if not sizes.has_both or self._beside is None:
            self._attend_to_decodes(queries, by_head, step, sizes, kv, window)
            self._attend_to_chunks(queries, by_head, step, sizes, kv, window)
            return attended
        here = torch.cuda.current_stream(self._device)
        self._beside.wait_stream(here)
        with torch.cuda.stream(self._beside):
            self._attend_to_chunks(queries, by_head, step, sizes, kv, window)
        self._attend_to_decodes(queries, by_head, step, sizes, kv, window)
        here.wait_stream(self._beside)
        return attended

    def _attend_to_decodes(
        self,
        queries: Tensor,
        out: Tensor,
        step: StepInputs[Tensor],
        sizes: StepSizes,
        kv: PagedLayer,
        window: int | None,
    ) -> None:
        room, num_decodes = self._room, sizes.num_decodes
        if num_decodes == 0:
            return
        # In long steps too, where of the kernels around it only shared prefixes' is such a one: a form less to compile.
        pdl = queries.is_cuda
        shared = room.shared if sizes.num_shared_pieces else None
        if shared:
            shared_attention(queries, kv, step.shared_pieces, step.block_tables, shared, pdl=pdl)
        own, out = queries[:num_decodes], out[:num_decodes]
        tuning = INVARIANT_TUNING if self.is_batch_invariant else None
        decode_attention(own, kv, decode_batch(step), room.pieces, out, window, shared=shared, pdl=pdl, tuning=tuning)

    def _attend_to_chunks(
        self,
        queries: Tensor,
        out: Tensor,
        step: StepInputs[Tensor],
        sizes: StepSizes,
        kv: PagedLayer,
        window: int | None,
    ) -> None:
        if sizes.num_tiles:
            prefill_attention(queries, kv, step.tiles, step.block_tables, out, window)
        for run in sizes.dense_runs:
            out[run.rows].copy_(self._attend_densely(queries, run))

    def _attend_densely(self, queries: Tensor, run: DenseRun) -> Tensor:
        heads = (self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads)
        qkv = self._room.qkv[: len(queries)]
        _, keys, values = qkv.unflatten(1, (-1, self.config.head_dim)).split(heads, dim=1)
        return dense_attention(queries, keys, values, run)


class _Room:
    """Where a step works. Buffers are as long as the largest step; steps run one after the other."""

    def __init__(
        self,
        config: DecoderConfig,
        most: MostWork,
        kind: torch.dtype,
        device: torch.device,
        num_tokens: int,
        *,
        is_fp8: bool,
        is_batch_invariant: bool,
    ) -> None:
        """`num_tokens`: of the vocabulary, that logits are of."""

        def rows(size: int, dtype: torch.dtype = kind) -> Tensor:
            # Cleared: rows that are computed for nothing must not hold NaN.
            return torch.zeros((most.num_rows, size), dtype=dtype, device=device)

        def fp8_rows(size: int) -> Tensor | None:
            return rows(size, FP8) if is_fp8 else None

        num_pieces = max(num_pieces_for(most.num_sequences, has_fp8_cache) for has_fp8_cache in (False, True))
        if is_batch_invariant:
            num_pieces = most.num_sequences * -(-most.context_tokens // INVARIANT_PIECE_TOKENS)
        self.residual = rows(config.hidden_size)
        self.normed = rows(config.hidden_size)
        self.normed_fp8 = fp8_rows(config.hidden_size)
        self.qkv = rows(config.q_size + 2 * config.kv_size)
        self.queries = rows(config.q_size).view(most.num_rows, config.num_heads, config.head_dim)
        self.attended = rows(config.q_size)
        self.attended_fp8 = fp8_rows(config.q_size)
        self.hidden = rows(config.hidden_size)
        self.gate_up = rows(2 * config.intermediate_size)
        self.activated = rows(config.intermediate_size)
        self.activated_fp8 = fp8_rows(config.intermediate_size)
        self._scales = torch.zeros(most.num_rows, dtype=torch.float32, device=device)
        self.pieces = piece_results(
            num_pieces, most.num_sequences, config.num_heads, config.num_kv_heads, config.head_dim, device
        )
        self.shared = shared_results(
            num_shared_pieces_for(most.num_sequences), config.num_heads, config.head_dim, device
        )
        self.sampled = torch.zeros((most.num_sequences, config.hidden_size), dtype=kind, device=device)
        self.sampled_attended = torch.zeros((most.num_sequences, config.q_size), dtype=kind, device=device)
        self.logits = torch.zeros((most.num_sequences, num_tokens), dtype=kind, device=device)
        self.choices = part_results(most.num_sequences, config.vocabulary_size, device)

    def rows(self, plain: Tensor, fp8: Tensor | None, num_rows: int, rounds: bool) -> Rows:
        """Rows for a product: rounded to fp8, or as they are.

        The scales are the same memory for all: a product's are read by the kernel behind it, which comes before the
        next rows are rounded, or is the one that rounds them and reads a row's before it writes it.
        """
        if not rounds:
            return Rows(plain[:num_rows])
        assert fp8 is not None
        return Rows(fp8[:num_rows], self._scales[:num_rows])
