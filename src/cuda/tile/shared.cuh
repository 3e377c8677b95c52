// A tile of rows in shared memory as the copy engine writes it and the tensor cores read it: columns of 64 elements (128 bytes) of
// 16-bit type, each a stack of rows with their 16-byte units swizzled over 8 rows (the 128-byte swizzle). Tiles start at multiples of 1024
// bytes.
#pragma once

#include <cstdint>

namespace tilewise::tile {

template <int kRows_, int kColumns_>
struct alignas(1024) Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPanels = (kColumns + 63) / 64;
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kRows % 8 == 0, "the swizzle spans 8 rows");
  unsigned char bytes[kBytes];

  // Where the 16 bytes with an element of 16 bits are, and the element.
  __device__ __forceinline__ static constexpr int offset(int row, int unit) {
    return unit / 8 * kPanelBytes + row * 128 + ((unit ^ row) % 8) * 16;
  }
  __device__ __forceinline__ uint16_t& at(int row, int column) {
    return reinterpret_cast<uint16_t*>(bytes + offset(row, column / 8))[column % 8];
  }
};

// The low half of a wgmma operand's name: where it starts and the bytes from its first 64 columns to the next 64. Adding bytes / 16
// moves the start. Rows are M or N and columns are summed over, and panel_bytes is not read (but without a swizzle, where it goes from 8
// columns to the next: ptx::kNarrow); or rows are summed over and columns are N.
__device__ __forceinline__ uint32_t operand(const void* start, uint32_t panel_bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(start));
  return (address & 0x3FFFF) >> 4 | (panel_bytes >> 4) << 16;
}

}  // namespace tilewise::tile
