// How the backward pass is cut into works, units and shares of dq, and in which order they are claimed: docs/kernels/backward_sm90.md,
// "Works, units and the ring of sums".
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/gradient_params.h"
#include "tilewise/tilewise.hpp"

namespace tilewise::cuda {

// What gradient_params.h counts. Packed: bounds, since a sequence has at most one step or block that is not full.
struct Counts {
  int64_t q_tiles, k_tiles, k_blocks, tiles, key_tiles, all_tiles, all_key_tiles, works, units, shares, lag, claims, ring, ahead;
  int64_t plain, section, interleave, run;  // UnitOrder
  int64_t rest_ctas;                        // that preprocess the units that are not `ahead`
  Counts(const Problem& p, const BackwardConfig& c, const Device& device) {
    q_tiles = c.tiles() * (p.packed ? p.total_q / c.block_m + p.batch : ceil_div<int64_t>(p.seqlen_q, c.block_m));
    k_blocks = p.packed ? p.total_k / c.block_n() + p.batch : ceil_div<int64_t>(p.seqlen_k, c.block_n());
    const int64_t sequences = p.packed ? 1 : p.batch;
    k_tiles = p.packed ? p.total_k / kBlockM + p.batch : ceil_div<int64_t>(p.seqlen_k, kBlockM);
    tiles = sequences * q_tiles;
    key_tiles = sequences * k_tiles;
    all_tiles = p.num_heads_q * tiles;
    all_key_tiles = p.num_heads_kv * key_tiles;
    units = k_blocks > 0 ? p.num_heads_kv * sequences : 0;
    works = units * k_blocks;
    // A share comes when the works of its unit have probably been finished: a claim for each SM later, if there are more works than SMs.
    // Where works are of different length, or wait for one another, it takes longer until the last one is. Few works have small shares, for
    // SMs without work to take.
    const int64_t sms = device.units / c.ctas();  // or pairs of them
    const bool rounds = works > sms, masked = p.window_left >= 0 || p.window_right >= 0, uneven = p.packed || masked;
    const int64_t margin = (1 + uneven + p.deterministic) * sms + (p.packed ? k_blocks : 0);
    shares = rounds ? k_blocks : ceil_div<int64_t>(std::max<int64_t>(p.num_heads_q / p.num_heads_kv * q_tiles, 1), 2);
    // Blocks of different length: the longest come first, those of several units together, so that the very last ones are short. With few
    // blocks to a unit, short works are better mixed with long ones until the end (measured with 8; a model says that with 32 they are
    // not), and so are packed sequences.
    const bool at_end = rounds && uneven && !p.deterministic && (p.packed || 5 * k_blocks <= sms);
    interleave = 1;
    if (at_end)
      interleave = std::min(std::max<int64_t>(margin / k_blocks + 1, 3), units);
    else if (rounds && (uneven || p.deterministic))
      interleave = std::clamp<int64_t>(alternating(p, sms, masked), 1, units);
    plain = at_end ? units - interleave : 0;
    run = std::max<int64_t>(k_blocks, 1);
    section = std::max<int64_t>(units, 1);
    fall_in_runs(p, c);
    const int64_t after = p.deterministic ? margin : std::max(margin - (interleave - 1) * k_blocks, at_end ? 0 : sms);
    lag = rounds ? std::min(together() * k_blocks + after, works) : works;
    claims = lag + units * shares;
    ring = rounds ? std::min(units, 2 * together() + ceil_div<int64_t>(2 * after + sms, k_blocks)) : units;
    // An eighth of the SMs (measured), if each of their 32 warps has two tiles or more.
    rest_ctas = std::max(device.units / 8, 1);
    ahead = rounds ? first_units(sms) : units;
    if ((units - ahead) * q_tiles * (p.num_heads_q / p.num_heads_kv) < 64 * rest_ctas) ahead = units;
  }
  // Deterministic blocks fall, so under a causal mask a unit's longest ones come last, when there is little left to do beside them. So long
  // sequences fall in runs, and runs of longer blocks come first: 12 blocks, 6 where heads are grouped, whose blocks wait longer for one
  // another; a run of 16 units together (measured). Fewer than 32 blocks, of pairs 64, lose by it, and so do those of a sequence that has
  // less than a work for each SM, since all can begin at once. The order of additions follows from `run`, for which neither the SMs nor
  // what else is in the batch may count. What a section is changes only who claims when.
  void fall_in_runs(const Problem& p, const BackwardConfig& c) {
    if (!p.deterministic || p.packed || p.window_left >= 0 || p.window_right < 0) return;
    if (k_blocks < 32 * c.ctas() || p.num_heads_kv * k_blocks < 128 / c.ctas()) return;
    run = p.num_heads_q == p.num_heads_kv ? 12 : 6;
    section = std::min<int64_t>(16, units);
    interleave = std::min(interleave, section);
  }
  // Units whose works are mixed, at most.
  int64_t together() const { return run < k_blocks ? section : interleave; }
  // Units that the first works are of, one for each SM; all, if that is not sure.
  int64_t first_units(int64_t sms) const {
    if (plain > 0) return ceil_div(sms, k_blocks) <= plain ? ceil_div(sms, k_blocks) : units;
    const int64_t first = ceil_div(sms, interleave * run) * interleave;
    return std::min(first <= section ? first : ceil_div(sms, section * k_blocks) * section, units);
  }
  // How many units alternate all the time. Deterministic blocks of a unit wait for one another, so CTAs that claim at the same time should
  // get blocks of different units: as many units as have a work for each SM, twice as many where that leaves 16 groups of them. Packed, the
  // blocks of one sequence wait: two units under a mask, else as many as have a work of such a sequence for each SM, eight at most.
  int64_t alternating(const Problem& p, int64_t sms, bool masked) const {
    const auto units_of = [](int64_t of_works, int64_t blocks) { return (of_works + blocks / 2) / blocks; };
    const int64_t enough = units_of(sms, k_blocks);
    if (!p.deterministic) return enough;
    if (!p.packed) return std::max(enough, std::min(units_of(2 * sms, k_blocks), units / 16));
    return masked ? 2 : std::min<int64_t>(units_of(sms, std::max<int64_t>(k_blocks / p.batch, 1)), 8);
  }
  // Nobody waits for who comes later: all works of a share's unit have smaller claims than the share, and all shares of the unit that had
  // the sums before have smaller claims than a work that adds to them. Else the kernel could wait for ever.
  bool waits_for_earlier_only() const {
    return lag >= (shares == k_blocks ? together() * k_blocks : works) &&
           (ring == units || (shares == k_blocks && (ring - together()) * k_blocks >= lag));
  }
  UnitOrder order() const {
    return {static_cast<int>(plain), static_cast<int>(section), static_cast<int>(interleave), static_cast<int>(run)};
  }
};

}  // namespace tilewise::cuda
