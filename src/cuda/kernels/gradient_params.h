// What the host tells the backward kernels, and where things lie in the workspace.
#pragma once

#include <cuda.h>

#include "core/mask.h"
#include "core/sequence.h"
#include "cuda/kernels/params.h"

namespace tilewise {

constexpr int kBlockM = 64;  // queries in a tile of dq and of the rows: the workspace's unit
constexpr int kRowFloats = 2 * kBlockM;
constexpr int kAddendBytes = 2 * kBlockM * 16;
constexpr int kWarpRows = kBlockM / 2;  // that a warp of the preprocess kernels has
constexpr int kPreprocessThreads = 128, kRestThreads = 1024, kPostprocessThreads = 128;

// All that changes the instructions of the inner loop.
struct BackwardConfig {
  ptx::Element element = ptx::Element::kBFloat16;
  int head_dim, head_dim_v;          // largest; smaller ones are filled with zeros
  int block_m;                       // queries of a step: one or two tiles
  int mains;                         // main warpgroups, of 64 keys each
  int stages;                        // steps' q and do in shared memory
  int dq_columns;                    // columns of dq that are multiplied at once
  int main_registers, dq_registers;  // per thread of a main warpgroup and of the dq warpgroup
  bool addends = false;              // the products subtract lse and delta, as further columns; else threads do
  int pace = 0;                      // clocks between additions to dq, so that they do not block everyone's way to shared memory
  // Two CTAs take 128 keys, 64 each, and exchange ds (backward_pair.cuh); the two main warpgroups of each have the same keys: one dv, the
  // other dk (backward_roles.cuh).
  bool pair = false;
  bool modified = false;                                                  // softcap or ALiBi
  TW_HD constexpr int ctas() const { return pair ? 2 : 1; }               // that do a work
  TW_HD constexpr int own_tiles() const { return pair ? 1 : mains; }      // 64 keys each, of a CTA
  TW_HD constexpr int key_tiles() const { return ctas() * own_tiles(); }  // and of a work
  TW_HD constexpr int tiles() const { return block_m / kBlockM; }
  TW_HD constexpr int block_n() const { return 64 * key_tiles(); }
  TW_HD constexpr int threads() const { return 128 * (mains + 2); }
  // Columns of dq that each CTA of a pair adds for itself, and of a tile of sums: where their order matters, both have theirs.
  TW_HD constexpr int own_columns() const { return pair ? head_dim - ctas() * dq_columns : 0; }
  TW_HD constexpr int sum_columns(bool deterministic) const { return head_dim + (deterministic ? own_columns() : 0); }
};

// Rows of a tile of gradients that are not finite: a warp has 16 of them, and four bits for each of its first and last 8.
struct SpoiltRows {
  unsigned of[4][2];
};
// Of dk (0) and dv (1).
struct SpoiltKeys {
  SpoiltRows rows[2];
};

// Which packed sequence and which of its blocks; batch is -1 where there is none.
struct Place {
  int batch, block, blocks;
};

// How far a unit is: its half tiles that are preprocessed (of units that are not `ahead`), CTAs that have added a block of keys to its dq,
// and CTAs that have written a share of dq.
struct Progress {
  int ready, added, written;
};
struct Counters {
  int begun;   // not 0: what the first units need is there
  int claims;  // so far
  int spoilt;  // not 0: a row of a gradient is not finite
};

// The part of a sequence that takes part: queries that see a key, keys that a query sees. Rows around it may hold anything.
struct Trimmed {
  Sequence sequence;     // with its first row and length
  Band band;             // of the trimmed sequence
  int q_begin, k_begin;  // rows that were cut off before it
};

// The order of works. First those of the units before `plain`, unit by unit. Then sections of `section` units: the first `run` blocks of
// each of them, then the next ones, and so on; of a run, those of `interleave` units alternate: the first block of each, then the second.
// Deterministic blocks fall within a run: a block adds to dq behind those that come before it. Mostly a run is all blocks, a section all
// units.
struct UnitOrder {
  int plain, section, interleave, run;
};

// The unit of a work, which is not past the last, which of the unit's blocks of keys it is, and the run of blocks that fall of which it is
// one (of the whole unit, where it is the only one).
struct UnitBlock {
  int unit, block, run_begin, run_end;
};
TW_HD UnitBlock unit_block(const UnitOrder& order, int all_units, int k_blocks, bool falling, int work) {
  // The units before `plain`, or a section of those from there on.
  const bool plain = work < order.plain * k_blocks;
  const int first = plain ? 0 : order.plain + (work / k_blocks - order.plain) / order.section * order.section;
  const int units = plain ? order.plain : min_of(order.section, all_units - first), run = order.run;
  const int interleave = plain ? 1 : order.interleave;
  // Their runs, then groups of units that alternate, then blocks.
  int index = work - first * k_blocks;
  const int begin = index / (run * units) * run, blocks = min_of(run, k_blocks - begin);
  index -= begin * units;
  const int group = index / (interleave * blocks) * interleave, alternate = min_of(interleave, units - group);
  index -= group * blocks;
  const int block = index / alternate;
  return {first + group + index % alternate, begin + (falling ? blocks - 1 - block : block), begin, begin + blocks};
}

struct BackwardParams {
  CUtensorMap q_map, k_map, v_map, do_map;  // boxes of a step's queries, of 64 keys
  Elements q, k, v, o, do_, dq, dk, dv;
  const float *lse, *dlse;  // dlse: null: none
  long long lse_batch, lse_head, dlse_batch, dlse_head;
  const int *cu_seqlens_q, *cu_seqlens_k, *seqused_k;
  const float *alibi_slopes, *sink;  // null: none
  float* dsink;
  long long alibi_batch;
  long long window_left, window_right;
  int batch, num_heads, group;  // group: query heads of one key/value head
  int seqlen_q, seqlen_k;       // packed: upper bounds
  int head_dim, head_dim_v;
  float scale, scale_log2;          // scale_log2: for powers of two, never near 0
  float softcap_log2, tanh_factor;  // a score x becomes softcap_log2 * tanh, where e^(2 y) of tanh(y) is 2^(x * tanh_factor); 0: none
  bool top_left, deterministic;
  bool alike;  // all sequences are: `part` is what takes part of each, else it means nothing
  Trimmed part;
  bool accumulate;  // dq, dk and dv are float32 and are added to
  int block_m;      // of a step: each sequence has whole steps of tiles
  // Of one head, packed: bounds; not packed: of one sequence. Tiles of rows and of keys, and blocks of keys.
  int q_tiles, k_tiles, k_blocks;
  // A work is a block of keys, a unit the query heads of one key/value head (of one sequence, where sequences are not packed): k_blocks
  // works and the sums of group * q_tiles tiles of dq. The CTAs, or pairs of them, claim numbers in rising order: claim w stands for work
  // w, and for share w - lag of dq, whose sums are mostly complete by then; unit_block() says in which order works come. A unit has as many
  // shares as works, or more where there are few works. Sums lie in a ring of units: dq of one is written before the next one there adds.
  int works, units, shares, lag, claims, ring;
  UnitOrder order;
  int ahead;  // units that are preprocessed before any work begins; the others meanwhile, on some SMs
  // Workspace. A head's tiles: those of sequence b begin at first_tile(), its keys' at first_key_tile(). The first preprocess kernel
  // sets all from `turn` on to 0; rows or addends, dsink_sum and the ring's first sums are written by it for units that are `ahead`, for
  // the others by the second one, unit by unit (Progress::ready).
  long long tiles, key_tiles;  // of one head in the workspace
  int sum_columns;             // of a tile of dq's sums
  float* dq_sum;               // [ring][head of the group][tile][sum_columns / 8][128 threads][4]: as the tensor cores hold accumulators
  float* rows;                 // [head][tile][2][64]: -lse in units of log2, -delta = dlse - rowsum(do * o), in the order of row_place()
  unsigned char* addends;      // [head][step][2][block_m] rows of 8 bfloat16, of which twice the sum of three is -lse / scale, and
                               // -delta; or null, where rows are used
  float* dsink_sum;            // [head][tile][2]
  Place* block_order;          // [k_blocks], packed: the blocks of keys in the order of works, which the first preprocess kernel makes
  long long zeros;             // 16 bytes each, from `turn` on: what begins with 0
  int* turn;                   // [head][tile][CTA of a pair]: how many blocks of keys have added to dq, where their order matters
  SpoiltKeys* spoilt_keys;     // [key/value head][tile of keys]
  SpoiltRows* spoilt;          // [head][tile][head_dim / 32]: of dq, by 32 columns
  Progress* progress;          // [unit]
  Counters* counters;
  int block_n;  // keys of a work
};

TW_HD Trimmed trim(Sequence sequence, long long window_left, long long window_right, bool top_left) {
  Trimmed t{sequence, make_band(sequence.seqlen_q, sequence.seqlen_k, window_left, window_right, top_left), 0, 0};
  const int q_begin = sequence.seqlen_k > 0 ? first_query(t.band, 0) : 0;
  const int q_end = sequence.seqlen_k > 0 ? min_of(end_query(t.band, sequence.seqlen_k - 1), sequence.seqlen_q) : 0;
  if (q_begin >= q_end) {
    t.band.seqlen_q = t.band.seqlen_k = t.sequence.seqlen_q = t.sequence.seqlen_k = 0;
    return t;
  }
  const int k_begin = first_key(t.band, q_begin), k_end = end_key(t.band, q_end - 1);
  t.q_begin = q_begin;
  t.k_begin = k_begin;
  t.sequence = {sequence.q_row + q_begin, sequence.k_row + k_begin, q_end - q_begin, k_end - k_begin};
  t.band.seqlen_q = q_end - q_begin;
  t.band.seqlen_k = k_end - k_begin;
  t.band.offset += q_begin - k_begin;
  return t;
}

// Rows of a tile, so that what a thread needs of 16 of them is together: in the accumulators it has columns 8 j + 2 (t % 4) + {0, 1}.
TW_HD int row_place(int row) { return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2; }

// Tiles of sequence `batch` begin here: each takes whole steps, at most one more than its share of rows.
TW_HD long long first_tile(const BackwardParams& p, long long q_row, int batch) {
  return p.cu_seqlens_q ? (q_row / p.block_m + batch) * (p.block_m / kBlockM) : static_cast<long long>(batch) * p.q_tiles;
}

TW_HD long long first_key_tile(const BackwardParams& p, long long k_row, int batch) {
  return p.cu_seqlens_k ? k_row / kBlockM + batch : static_cast<long long>(batch) * p.k_tiles;
}

// How many blocks of keys add to a step's dq before block n, which is in the run from run_begin to run_end: those of runs before it, and of
// its own run those behind it, as they are claimed.
TW_HD int turn_of(const Band& band, int m_block, int n_block, int run_begin, int run_end, int block_m, int block_n) {
  const BlockRange seen = kv_blocks(band, m_block * block_m, min_of((m_block + 1) * block_m, band.seqlen_q), block_n);
  return max_of(run_begin - seen.begin, 0) + min_of(run_end, seen.end) - 1 - n_block;
}

}  // namespace tilewise
