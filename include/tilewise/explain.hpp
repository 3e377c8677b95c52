// What a plan will do and what bounds it: tiles, arithmetic, traffic between the warehouse (DRAM, HBM) and the desk
// (L2 of a core, shared memory of an SM), and the time they allow. Counted from the mask, block by block.
#pragma once

#include "tilewise/tilewise.hpp"

namespace tilewise {

// How a kernel cuts a problem on a device.
struct TilePlan {
  int64_t block_m = 0;     // rows that share one reading of K and V
  int64_t block_n = 0;     // keys in one tile on the desk
  int64_t desk_bytes = 0;  // what one unit keeps on its desk
  int64_t units = 0;       // threads or CTAs that work at the same time
  bool grouped = false;    // a row is a (query, head) of all the query heads of a key/value head; else a query of one head
  int64_t head_dim = 0;    // columns that are multiplied: the problem's, or as many as the kernel fills them up to with zeros
  int64_t head_dim_v = 0;
};

// The rows of one head group (not grouped: of one query head) of the first sequence as a picture of at most 16 x 64 cells, each of
// rows_per_cell x columns_per_cell tiles. In a row of cells [begin, end) is touched, of which [full_begin, full_end) needs no mask.
struct TilePicture {
  struct Row {
    int64_t begin, full_begin, full_end, end;
  };
  int64_t rows_per_cell = 1, columns_per_cell = 1, columns = 0;
  std::vector<Row> rows;
};

struct Explanation {
  std::string kernel;
  TilePlan tiles;
  std::vector<Candidate> candidates;
  int64_t work_items = 0;  // (batch, head group or head, block of rows); backward: (batch, key/value head, block of keys)
  int64_t full_tiles = 0, masked_tiles = 0, skipped_tiles = 0;  // block_m x block_n tiles: no mask, mask applied, never touched
  TilePicture picture;
  double flops = 0;                            // useful: visible (query, key) pairs only
  double least_bytes = 0;                      // every tensor once: no kernel moves less
  double flash_bytes = 0, standard_bytes = 0;  // to and from the warehouse
  double tile_bytes = 0;  // to and from the desks: as flash_bytes on a CPU, more on a GPU, whose L2 serves tiles that are read again
  int64_t workspace_bytes = 0, flash_extra_bytes = 0, standard_extra_bytes = 0;  // memory beyond the tensors; flash: workspace and lse
  double intensity = 0;                                                          // flops / flash_bytes
};

// Lengths of packed sequences are data; without them every sequence counts with its upper bound, at most the total.
struct Lengths {
  std::vector<int32_t> q, k;  // [batch], k after seqused_k; empty: the problem's bounds
};
TW_API Result<Explanation> explain(const Problem& problem, const Device& device = Device::cpu(), const Lengths& lengths = {});

// The machine's own limits, measured now in about half a second, with all of the device's units.
struct Rates {
  double flops_per_second = 0;  // dense multiply-add in the arithmetic that the kernels of dtype use
  double bytes_per_second = 0;  // reading memory far larger than the caches
};
TW_API Result<Rates> measure_rates(const Device& device, DataType dtype);

}  // namespace tilewise
