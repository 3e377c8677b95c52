// What a plan will do, counted from the mask: one walk over the blocks of rows of each distinct sequence, and core/mask.h
// says which blocks of keys each of them touches. Counts are double: exact up to 2^53, and never an overflow.
#include "tilewise/explain.hpp"

#include <algorithm>

#include "core/mask.h"
#include "core/sequence.h"
#include "registry/kernel.h"

namespace tilewise {
namespace {

// The rows of `group` query heads that share blocks, of one sequence: all those of a key/value head, or one.
struct GroupCounts {
  double items = 0, full = 0, masked = 0, skipped = 0;
  double pairs = 0;      // visible (query, key) pairs of one query head
  double keys_read = 0;  // keys in the tiles that are touched, summed over blocks of rows
  double rows_read = 0;  // rows in the tiles that are touched, summed over blocks of keys
};

// Sum over i in [0, n) of clamp(i + first, 0, limit).
double clamped_sum(double first, double n, double limit) {
  const double rise = std::clamp(-first, 0.0, n), top = std::clamp(limit - first, rise, n);  // 0 before rise, limit from top on
  return (top - rise) * (first + (rise + top - 1) / 2) + (n - top) * limit;
}

// Rows of (query, head), [begin, end), and the queries that they hold.
struct Rows {
  int64_t begin, end;
  int m_begin, m_end;
  Rows(int64_t first, int64_t past, int group)
      : begin(first), end(past), m_begin(query_head_of_row(first, group).query), m_end(query_head_of_row(past - 1, group).query + 1) {}
};

GroupCounts count_group(const Band& band, int group, const TilePlan& tiles) {
  GroupCounts c;
  const int64_t rows = static_cast<int64_t>(band.seqlen_q) * group;
  const int block_n = static_cast<int>(std::min<int64_t>(tiles.block_n, kMaxSeqlen));
  const double key_blocks = ceil_div(band.seqlen_k, block_n);
  for (int64_t row = 0; row < rows; row += tiles.block_m) {
    const Rows block(row, std::min(row + tiles.block_m, rows), group);
    const BlockRange blocks = kv_blocks(band, block.m_begin, block.m_end, block_n);
    const double touched = blocks.end - blocks.begin, full = blocks.full_end - blocks.full_begin;
    c.items += 1;
    c.full += full;
    c.masked += touched - full;
    c.skipped += key_blocks - touched;
    const int64_t keys_end = std::min<int64_t>(static_cast<int64_t>(blocks.end) * block_n, band.seqlen_k);
    c.keys_read += static_cast<double>(keys_end - static_cast<int64_t>(blocks.begin) * block_n);
    c.rows_read += touched * static_cast<double>(block.end - block.begin);
  }
  const double n = band.seqlen_q, limit = band.seqlen_k;
  c.pairs = clamped_sum(raw_end_key(band, 0), n, limit) - clamped_sum(raw_first_key(band, 0), n, limit);
  return c;
}

TilePicture draw(const Band& band, int group, const TilePlan& tiles) {
  constexpr int64_t kMaxRows = 16, kMaxColumns = 64;
  const int block_n = static_cast<int>(std::min<int64_t>(tiles.block_n, kMaxSeqlen));
  const int64_t rows = static_cast<int64_t>(band.seqlen_q) * group, key_blocks = ceil_div(band.seqlen_k, block_n);
  TilePicture picture;
  picture.rows_per_cell = std::max<int64_t>(ceil_div(ceil_div(rows, tiles.block_m), kMaxRows), 1);
  picture.columns_per_cell = std::max<int64_t>(ceil_div(key_blocks, kMaxColumns), 1);
  picture.columns = ceil_div(key_blocks, picture.columns_per_cell);
  const int64_t cell_rows = picture.rows_per_cell * tiles.block_m, across = picture.columns_per_cell;
  for (int64_t row = 0; row < rows; row += cell_rows) {
    const Rows cells(row, std::min(row + cell_rows, rows), group);
    const BlockRange blocks = kv_blocks(band, cells.m_begin, cells.m_end, block_n);
    TilePicture::Row r{blocks.begin / across, ceil_div<int64_t>(blocks.full_begin, across), 0, ceil_div<int64_t>(blocks.end, across)};
    r.full_end = blocks.full_end == key_blocks ? picture.columns : blocks.full_end / across;  // the last cell may be narrow
    if (blocks.full_begin == blocks.full_end || r.full_begin >= r.full_end) r.full_begin = r.full_end = r.end;
    picture.rows.push_back(r);
  }
  return picture;
}

int64_t to_count(double value) { return static_cast<int64_t>(std::min(value, 9.0e18)); }

double element_bytes(DataType dtype) { return dtype == DataType::kFloat32 ? 4 : 2; }

// Query heads whose rows lie in the same blocks.
int64_t heads_of_block(const Problem& p, const TilePlan& tiles) { return tiles.grouped ? p.num_heads_q / p.num_heads_kv : 1; }

// Adds up sequences.
class Counter {
 public:
  Counter(const Problem& problem, const Device& device, Explanation& e)
      : p_(problem), shared_cache_(device.type == DeviceType::kCuda), e_(e) {}

  void add(int64_t seqlen_q, int64_t seqlen_k, double times) {
    if (seqlen_q != seqlen_q_ || seqlen_k != seqlen_k_) {
      const Band band = make_band(static_cast<int>(seqlen_q), static_cast<int>(seqlen_k), p_.window_left, p_.window_right,
                                  p_.alignment == Alignment::kTopLeft);
      const int group = static_cast<int>(heads_of_block(p_, e_.tiles));
      counts_ = count_group(band, group, e_.tiles);
      if (seqlen_q_ < 0) e_.picture = draw(band, group, e_.tiles);
      seqlen_q_ = seqlen_q;
      seqlen_k_ = seqlen_k;
    }
    const double groups = times * static_cast<double>(p_.num_heads_kv), heads = times * static_cast<double>(p_.num_heads_q);
    const double alike = e_.tiles.grouped ? groups : heads;  // walks over blocks of rows
    // Forward a unit takes a block of rows, backward a block of keys, and goes over all query heads of its head.
    const double key_blocks = static_cast<double>(ceil_div(seqlen_k, e_.tiles.block_n));
    items_ += p_.pass == Pass::kForward ? alike * counts_.items : groups * key_blocks;
    full_ += alike * counts_.full;
    masked_ += alike * counts_.masked;
    skipped_ += alike * counts_.skipped;
    keys_read_ += alike * counts_.keys_read;
    rows_read_ += alike * counts_.rows_read;
    pairs_ += heads * counts_.pairs;
    rows_ += heads * static_cast<double>(seqlen_q);
    group_keys_ += groups * static_cast<double>(seqlen_k);
    head_keys_ += heads * static_cast<double>(seqlen_k);
    scores_ += heads * static_cast<double>(seqlen_q) * static_cast<double>(seqlen_k);
  }

  void finish() {
    e_.work_items = to_count(items_);
    e_.full_tiles = to_count(full_);
    e_.masked_tiles = to_count(masked_);
    e_.skipped_tiles = to_count(skipped_);
    const double e = element_bytes(p_.dtype), d = static_cast<double>(p_.head_dim), dv = static_cast<double>(p_.head_dim_v);
    const double q = e * rows_ * d, o = e * rows_ * dv, lse = 4 * rows_;
    if (p_.pass == Pass::kForward) {
      // Products S = QK' and O = PV.
      e_.flops = 2 * pairs_ * (d + dv);
      e_.least_bytes = q + o + lse + e * group_keys_ * (d + dv);
      e_.tile_bytes = q + o + lse + e * keys_read_ * (d + dv);
      e_.flash_bytes = shared_cache_ ? e_.least_bytes : e_.tile_bytes;
      // S is written and read, P is written and read; each query head's product reads its K and its V.
      e_.standard_bytes = q + o + e * head_keys_ * (d + dv) + 4 * e * scores_;
    } else {
      // Products S = QK', dP = dO V', dV = P' dO, dQ = dS K and dK = dS' Q.
      e_.flops = 2 * pairs_ * (3 * d + 2 * dv);
      // A gradient is written in the element type, or float32 is read and written where it is added to.
      const double gradient = p_.accumulate ? 8 : e, dq = gradient * rows_ * d, with_gradient = (e + gradient) * (d + dv);
      e_.least_bytes = q + dq + 2 * o + lse + with_gradient * group_keys_;
      // Before: o and do are read and delta is written. Then each block of keys stays on the desk once, with its dk and dv,
      // while the rows that see it pass by: q, do, lse and delta are read, the float32 sum of dq is read and written. That sum
      // is cleared before and read once more to be rounded to dq.
      const double delta = 4 * rows_, dq_sum = 4 * rows_ * d;
      e_.tile_bytes = 2 * o + delta + with_gradient * group_keys_ + rows_read_ * (e * (d + dv) + 8 + 8 * d) + 2 * dq_sum + dq;
      e_.flash_bytes = shared_cache_ ? e_.least_bytes + 2 * static_cast<double>(e_.workspace_bytes) : e_.tile_bytes;
      // P of the forward pass is read for dV and for dS, dP written and read, dS written and read for dQ and for dK.
      e_.standard_bytes = 2 * o + q + dq + with_gradient * head_keys_ + 7 * e * scores_;
    }
    e_.intensity = e_.flash_bytes > 0 ? e_.flops / e_.flash_bytes : 0;
    e_.flash_extra_bytes = e_.workspace_bytes + to_count(lse);
  }

 private:
  const Problem& p_;
  // Of a GPU: blocks that work at the same time share the keys and values of one or a few heads, and L2 holds those. What is read
  // again comes from there, so that every tensor, and in backward the workspace, crosses to memory once each way.
  const bool shared_cache_;
  Explanation& e_;
  int64_t seqlen_q_ = -1, seqlen_k_ = -1;  // of counts_
  GroupCounts counts_;
  double items_ = 0, full_ = 0, masked_ = 0, skipped_ = 0, keys_read_ = 0, rows_read_ = 0, pairs_ = 0;
  double rows_ = 0;                        // (query, head)
  double group_keys_ = 0, head_keys_ = 0;  // keys, once per key/value head and once per query head
  double scores_ = 0;                      // elements of S, which a mask does not make smaller
};

Status check_lengths(const char* name, const std::vector<int32_t>& lengths, int64_t batch, int64_t bound) {
  if (lengths.empty()) return {};
  if (static_cast<int64_t>(lengths.size()) != batch) {
    return invalid_argument("lengths." + std::string(name) + " has " + std::to_string(lengths.size()) + " entries, but batch is " +
                            std::to_string(batch));
  }
  for (const int32_t length : lengths) {
    if (length < 0 || length > bound) {
      return invalid_argument("lengths." + std::string(name) + " has " + std::to_string(length) + ", which is not between 0 and " +
                              std::to_string(bound));
    }
  }
  return {};
}

void count_sequences(const Problem& p, const Lengths& lengths, Counter& counter) {
  if (!p.packed && lengths.q.empty() && lengths.k.empty()) {
    counter.add(p.seqlen_q, p.seqlen_k, static_cast<double>(p.batch));
    return;
  }
  int64_t left_q = p.packed ? p.total_q : p.batch * p.seqlen_q, left_k = p.packed ? p.total_k : p.batch * p.seqlen_k;
  for (int64_t b = 0, same = 1; b < p.batch; b += same) {
    const auto index = static_cast<size_t>(b);
    const int64_t q = lengths.q.empty() ? std::min(p.seqlen_q, left_q) : lengths.q[index];
    const int64_t k = lengths.k.empty() ? std::min(p.seqlen_k, left_k) : lengths.k[index];
    same = 1;
    if (lengths.q.empty() && lengths.k.empty())  // as many alike as the totals allow
      same = std::max<int64_t>(std::min({p.batch - b, q > 0 ? left_q / q : p.batch, k > 0 ? left_k / k : p.batch}), 1);
    left_q -= same * q;
    left_k -= same * k;
    counter.add(q, k, static_cast<double>(same));
  }
}

}  // namespace

Result<Explanation> explain(const Problem& problem, const Device& device, const Lengths& lengths) {
  if (Status status = problem.validate(); !status.ok()) return status;
  if (Status status = check_lengths("q", lengths.q, problem.batch, problem.seqlen_q); !status.ok()) return status;
  if (Status status = check_lengths("k", lengths.k, problem.batch, problem.seqlen_k); !status.ok()) return status;
  const Result<const Kernel*> kernel = select_kernel(problem, device);
  if (!kernel) return kernel.status();

  Explanation e;
  e.kernel = (*kernel)->name;
  e.tiles = (*kernel)->tile_plan(problem, device);
  // A few seconds of counting. Blocks of the rows of one head group, or head, are what is walked; nothing else is large.
  constexpr int64_t kMostBlocks = 1 << 28;
  const int64_t blocks = ceil_div(problem.seqlen_q * heads_of_block(problem, e.tiles), e.tiles.block_m);
  if (blocks > kMostBlocks) {
    return unsupported("seqlen_q " + std::to_string(problem.seqlen_q) + " with num_heads_q " + std::to_string(problem.num_heads_q) +
                       " over num_heads_kv " + std::to_string(problem.num_heads_kv) + " makes " + std::to_string(blocks) +
                       " blocks of rows, and explain counts no more than " + std::to_string(kMostBlocks));
  }
  e.candidates = list_candidates(problem, device);
  e.workspace_bytes = static_cast<int64_t>((*kernel)->workspace_bytes(problem, device));
  Counter counter(problem, device, e);
  count_sequences(problem, lengths, counter);
  counter.finish();

  // The textbook keeps S, which becomes P in place, and for the backward pass dP, which becomes dS. Sequences of a packed
  // batch are padded to the longest.
  const double longest_q = static_cast<double>(problem.packed ? std::min(problem.seqlen_q, problem.total_q) : problem.seqlen_q);
  const double longest_k = static_cast<double>(problem.packed ? std::min(problem.seqlen_k, problem.total_k) : problem.seqlen_k);
  const double matrix = static_cast<double>(problem.batch) * static_cast<double>(problem.num_heads_q) * longest_q * longest_k;
  e.standard_extra_bytes = to_count(matrix * element_bytes(problem.dtype) * (problem.pass == Pass::kForward ? 1 : 2));
  return e;
}

Result<Rates> measure_rates(const Device& device, DataType dtype) {
  if (dtype == DataType::kInt32) return invalid_argument("dtype int32 is none of fp32, bf16 and fp16");
  return backend_of(device.type).measure_rates(device, dtype);
}

}  // namespace tilewise
