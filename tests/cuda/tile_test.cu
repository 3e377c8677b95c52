// Each verb of src/cuda/tile on the device, against its specification on the host. Integer data, so that every result is exact.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "cuda/ptx/scalar.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/shared.cuh"
#include "cuda/tile/store.cuh"

namespace tilewise::tile {
namespace {

using ptx::Element;
constexpr Element kBFloat16 = Element::kBFloat16;

struct TileTest : testing::Test {
  void SetUp() override {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major != 9)
      GTEST_SKIP() << "needs a Hopper GPU";
  }
};

uint16_t bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return static_cast<uint16_t>(word >> 16);
}
float value(uint16_t x) {
  const uint32_t word = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &word, 4);
  return y;
}

// Memory of the device that starts as a copy of `host`.
template <class T>
struct OnDevice {
  T* data = nullptr;
  size_t count;
  explicit OnDevice(const std::vector<T>& host) : count(host.size()) {
    cudaMalloc(&data, count * sizeof(T));
    cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice);
  }
  ~OnDevice() { cudaFree(data); }
  std::vector<T> get() const {
    std::vector<T> host(count);
    EXPECT_EQ(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return host;
  }
};

template <int kRows, int kColumns>
__global__ void load_kernel(const __grid_constant__ CUtensorMap map, int row, int valid, int head, int batch, int columns, uint16_t* out) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& tile = *reinterpret_cast<Tile<kRows, kColumns>*>(memory);
  __shared__ Barrier full;
  if (threadIdx.x == 0) full.init(1);
  clear_panels(tile, valid > 0 ? columns : 0, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  __syncthreads();
  if (threadIdx.x == 0) load_rows(tile, &map, full, row, valid, head, batch, columns);
  full.wait(0);
  // The swizzle: 16-byte unit u of row r of a panel lies at unit u ^ (r % 8).
  for (int i = threadIdx.x; i < kRows * tile.kPanels * 64; i += blockDim.x) {
    const int r = i / (tile.kPanels * 64), c = i % (tile.kPanels * 64), unit = c % 64 / 8;
    out[i] = *reinterpret_cast<uint16_t*>(tile.bytes + c / 64 * tile.kPanelBytes + r * 128 + ((unit ^ (r % 8)) * 16) + c % 8 * 2);
  }
}

TEST_F(TileTest, LoadFillsRowsAndColumnsThatAreNotThereWithZeros) {
  constexpr int kTileRows = 80, kBatch = 2, kRowsInAll = 100, kHeads = 3, kColumns = 72;
  std::vector<uint16_t> host(kBatch * kRowsInAll * kHeads * kColumns);
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<uint16_t>(i % 60000 + 1);
  const OnDevice<uint16_t> source(host), out(std::vector<uint16_t>(kTileRows * 128, 7));
  CUtensorMap map;
  ASSERT_TRUE(make_tensor_map(
                  {source.data, true, kBatch, kRowsInAll, kHeads, kColumns, kRowsInAll * kHeads * kColumns, kHeads * kColumns, kColumns},
                  kTileRows, map)
                  .ok());
  for (const auto [row, valid] : {std::pair{0, 80}, {20, 80}, {0, 5}, {90, 10}, {17, 0}, {3, 79}, {5, 1000}}) {
    load_kernel<kTileRows, 128><<<1, 128, kTileRows * 256>>>(map, row, valid, 2, 1, kColumns, out.data);
    const std::vector<uint16_t> got = out.get();
    for (int r = 0; r < kTileRows; ++r)
      for (int c = 0; c < 128; ++c) {
        const bool there = r < valid && row + r < kRowsInAll && c < kColumns;
        ASSERT_EQ(got[r * 128 + c], there ? host[((kRowsInAll + row + r) * kHeads + 2) * kColumns + c] : 0)
            << row << " " << valid << " " << r << " " << c;
      }
  }
}

// One granule of memory with nothing mapped before and behind it.
struct Island {
  size_t bytes = 0;
  CUdeviceptr begin = 0;
  Island() {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0};
    driver<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity")(&bytes, &properties,
                                                                                      CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    CUdeviceptr reserved;
    CUmemGenericAllocationHandle handle;
    const CUmemAccessDesc access{properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    EXPECT_EQ(driver<decltype(&cuMemAddressReserve)>("cuMemAddressReserve")(&reserved, 3 * bytes, 0, 0, 0), CUDA_SUCCESS);
    begin = reserved + bytes;
    EXPECT_EQ(driver<decltype(&cuMemCreate)>("cuMemCreate")(&handle, bytes, &properties, 0), CUDA_SUCCESS);
    EXPECT_EQ(driver<decltype(&cuMemMap)>("cuMemMap")(begin, bytes, 0, handle, 0), CUDA_SUCCESS);
    EXPECT_EQ(driver<decltype(&cuMemSetAccess)>("cuMemSetAccess")(begin, bytes, &access, 1), CUDA_SUCCESS);
  }  // the end of the process gives it back
  template <class Function>
  static Function driver(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    EXPECT_EQ(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), cudaSuccess);
    return reinterpret_cast<Function>(function);
  }
};

TEST_F(TileTest, LoadTouchesNothingOutsideTheTensor) {
  cudaFree(nullptr);
  const Island island;
  constexpr int kRowsInAll = 100, kColumns = 40;
  const CUdeviceptr last = island.begin + island.bytes - kRowsInAll * kColumns * 2;
  for (const CUdeviceptr data : {island.begin, last}) {
    cudaMemset(reinterpret_cast<void*>(data), 1, kRowsInAll * kColumns * 2);
    CUtensorMap map;
    ASSERT_TRUE(make_tensor_map({reinterpret_cast<void*>(data), true, 1, kRowsInAll, 1, kColumns, 0, kColumns, kColumns}, 64, map).ok());
    const OnDevice<uint16_t> out(std::vector<uint16_t>(64 * 128, 7));
    for (const auto [row, valid] : {std::pair{0, 64}, {36, 64}, {64, 36}, {64, 0}, {128, -28}, {100000, -99900}}) {
      load_kernel<64, 128><<<1, 128, 64 * 256>>>(map, row, valid, 0, 0, kColumns, out.data);
      const std::vector<uint16_t> got = out.get();
      for (int i = 0; i < 64 * 128; ++i) ASSERT_EQ(got[i], i / 128 < valid && i % 128 < kColumns ? 0x0101 : 0) << row << " " << valid;
    }
  }
}

// out = (q k^T) v with both products, through every piece that carries a fragment.
template <int kKeys, int kDepth, int kWidth>
__global__ void products_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap out_map) {
  struct Memory {
    Tile<64, kDepth> q;
    Tile<2 * kKeys, kDepth> k;
    Tile<2 * kKeys, kWidth> v;
  };
  extern __shared__ __align__(1024) unsigned char memory[];
  Memory& shared = *reinterpret_cast<Memory*>(memory);
  __shared__ Barrier full[3];
  if (threadIdx.x == 0) {
    for (Barrier& barrier : full) barrier.init(1);
    load_rows(shared.q, &q_map, full[0], 0, 64, 0, 0, kDepth);
    load_rows(shared.k, &k_map, full[1], 0, 2 * kKeys, 0, 0, kDepth);
    load_rows(shared.v, &v_map, full[2], 0, 2 * kKeys, 0, 0, kWidth);
  }
  __syncthreads();
  for (Barrier& barrier : full) barrier.wait(0);
  float s[kKeys / 2], o[kWidth / 2];
  uint32_t p[kKeys / 4];
  for (int half = 0; half < 2; ++half) {
    ptx::wgmma_fence();
    multiply_scores<kBFloat16, kDepth, kKeys>(s, shared.q, shared.k, half * kKeys);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    hold(s);
    for (int i = 0; i < kKeys / 4; ++i) p[i] = ptx::pack<kBFloat16>(s[2 * i], s[2 * i + 1]);
    ptx::wgmma_fence();
    multiply_values<kBFloat16, kWidth, kKeys>(o, p, shared.v, half * kKeys, half > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    hold(o);
    hold(p);
  }
  // Out by way of shared memory; of the 64 rows the last three belong to somebody else.
  Tile<64, kWidth>& result = *reinterpret_cast<Tile<64, kWidth>*>(memory);
  __syncthreads();
  write_fragment<kWidth / 4>(result, [&](int i) { return ptx::pack<kBFloat16>(o[2 * i], o[2 * i + 1]); });
  ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  __syncthreads();
  if (threadIdx.x == 0) {
    store_rows(result, &out_map, 0, 61, 0, 0, kWidth);
    wait_stored();
  }
}

template <int kKeys, int kDepth, int kWidth>
void check_products() {
  const auto random = [](int count, int step) {
    std::vector<uint16_t> x(count);
    for (int i = 0; i < count; ++i) x[i] = bits(static_cast<float>((i * step + i / 7) % 3 - 1) * ((i * 13) % 5 == 0));
    return x;
  };
  const std::vector<uint16_t> q = random(64 * kDepth, 5), k = random(2 * kKeys * kDepth, 7), v = random(2 * kKeys * kWidth, 11);
  const OnDevice<uint16_t> dq(q), dk(k), dv(v), out(std::vector<uint16_t>(64 * kWidth, 0x7fc0));
  CUtensorMap qm, km, vm, om;
  ASSERT_TRUE(make_tensor_map({dq.data, true, 1, 64, 1, kDepth, 0, kDepth, 0}, 64, qm).ok());
  ASSERT_TRUE(make_tensor_map({dk.data, true, 1, 2 * kKeys, 1, kDepth, 0, kDepth, 0}, 2 * kKeys, km).ok());
  ASSERT_TRUE(make_tensor_map({dv.data, true, 1, 2 * kKeys, 1, kWidth, 0, kWidth, 0}, 2 * kKeys, vm).ok());
  ASSERT_TRUE(make_tensor_map({out.data, true, 1, 64, 1, kWidth, 0, kWidth, 0}, 64, om).ok());
  constexpr int kBytes = sizeof(Tile<64, kDepth>) + sizeof(Tile<2 * kKeys, kDepth>) + sizeof(Tile<2 * kKeys, kWidth>);
  const auto kernel = products_kernel<kKeys, kDepth, kWidth>;
  ASSERT_EQ(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), cudaSuccess);
  kernel<<<1, 128, kBytes>>>(qm, km, vm, om);
  const std::vector<uint16_t> got = out.get();
  for (int i = 0; i < 64; ++i)
    for (int d = 0; d < kWidth; ++d) {
      if (i >= 61) {
        ASSERT_EQ(got[i * kWidth + d], 0x7fc0) << "not written";
        continue;
      }
      float sum = 0;
      for (int j = 0; j < 2 * kKeys; ++j) {
        float score = 0;
        for (int c = 0; c < kDepth; ++c) score += value(q[i * kDepth + c]) * value(k[j * kDepth + c]);
        sum += score * value(v[j * kWidth + d]);
      }
      ASSERT_EQ(value(got[i * kWidth + d]), value(bits(sum))) << i << " " << d;
    }
}

TEST_F(TileTest, ProductsD64) { check_products<64, 64, 64>(); }
TEST_F(TileTest, ProductsD96) { check_products<64, 96, 96>(); }
TEST_F(TileTest, ProductsD128) { check_products<128, 128, 128>(); }
TEST_F(TileTest, ProductsD192) { check_products<64, 192, 192>(); }
TEST_F(TileTest, ProductsD192x128) { check_products<64, 192, 128>(); }
TEST_F(TileTest, ProductsD256) { check_products<64, 64, 256>(); }

// s = a b^T over rows of 8 columns that are taken twice; a's 8 rows are all 64. What lies around b is never multiplied.
constexpr int kNarrowRows = 128;
__global__ void narrow_kernel(const uint16_t* a, const uint16_t* b, float* out) {
  struct Memory {
    uint16_t before[64], a[64], between[64], b[kNarrowRows * 8], after[kNarrowRows * 8];
  };
  __shared__ __align__(128) Memory memory;
  uint16_t* all = reinterpret_cast<uint16_t*>(&memory);
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(Memory) / 2); i += 128) all[i] = 0x7fc0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 64; i += 128) memory.a[i] = a[i];
  for (int i = static_cast<int>(threadIdx.x); i < kNarrowRows * 8; i += 128) memory.b[i] = b[i];
  ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  __syncthreads();
  float s[kNarrowRows / 2];
  ptx::wgmma_fence();
  ptx::Wgmma<kBFloat16, kNarrowRows>::ss<ptx::kNarrowRepeated, ptx::kNarrow>(s, operand(memory.a, 0), operand(memory.b, 0), 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  hold(s);
  const Lane lane = this_lane();
  for (int i = 0; i < kNarrowRows / 2; ++i) out[(lane.row + 8 * row_of(i)) * kNarrowRows + lane.column + column_of(i)] = s[i];
}

TEST_F(TileTest, NarrowRowsAreTakenTwiceAndNothingElse) {
  std::vector<uint16_t> a(64), b(kNarrowRows * 8);
  for (int i = 0; i < 64; ++i) a[i] = bits(static_cast<float>(1 + i * 5 % 7));
  for (int i = 0; i < kNarrowRows * 8; ++i) b[i] = bits(static_cast<float>((i * 11 + i / 7) % 9 - 4));
  constexpr int kInfinite = 70;
  b[kInfinite * 8 + 3] = bits(INFINITY);
  const OnDevice<uint16_t> da(a), db(b);
  const OnDevice<float> out(std::vector<float>(64 * kNarrowRows, NAN));
  narrow_kernel<<<1, 128>>>(da.data, db.data, out.data);
  const std::vector<float> got = out.get();
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < kNarrowRows; ++j) {
      float sum = 0;
      for (int c = 0; c < 8; ++c) sum += 2 * value(a[i % 8 * 8 + c]) * value(b[j * 8 + c]);
      ASSERT_EQ(got[i * kNarrowRows + j], sum) << i << " " << j;
    }
}

// Blocks of 32 keys per row, exact until every row of the warp has met a key, then under the old max; out: max, sum, and whether the block
// went without a new max.
__global__ void rows_kernel(const float* scores, int blocks, float* out) {
  Rows rows;
  rows.clear();
  const Lane lane = this_lane();
  bool settled = false;
  for (int block = 0; block < blocks; ++block) {
    float s[16];
    for (int i = 0; i < 16; ++i) s[i] = scores[((block * 64) + lane.row + 8 * row_of(i)) * 32 + lane.column + column_of(i)];
    bool kept = settled;
    if (settled)
      rows.keep();
    else
      settled = rows.raise(s, 1);
    rows.exponentials(s, 1, 0, 8);
    rows.exponentials(s, 1, 8, 16);
    if (rows.outgrown()) {
      rows.shrink(s);
      kept = false;
    }
    float sum[2];
    row_sums(rows.sum, sum);
    for (int r = 0; r < 2; ++r) {
      float* row = out + (block * 64 + lane.row + 8 * r) * 3;
      if (lane.column == 0) row[0] = rows.max[r], row[1] = sum[r], row[2] = kept;
    }
  }
}

TEST_F(TileTest, RowsKeepTheirMeaningUnderAnOldMaximum) {
  constexpr int kBlocks = 4;
  std::vector<float> scores(kBlocks * 64 * 32);
  for (int block = 0; block < kBlocks; ++block)
    for (int i = 0; i < 64 * 32; ++i) {
      const int warp = i / 32 / 16;
      float x = static_cast<float>((i * 37 + block * 11) % 9) - 4;
      if (block == 2 && warp == 1) x += 100;      // outgrows the old maximum
      if (block == 2 && warp == 3) x += 300;      // beyond float
      if (block < 2 && warp == 2) x = -INFINITY;  // sees nothing at first
      scores[block * 64 * 32 + i] = x;
    }
  const OnDevice<float> in(scores), out(std::vector<float>(kBlocks * 64 * 3));
  rows_kernel<<<1, 128>>>(in.data, kBlocks, out.data);
  const std::vector<float> got = out.get();
  for (int row = 0; row < 64; ++row) {
    double sum = 0;
    for (int block = 0; block < kBlocks; ++block) {
      for (int c = 0; c < 32; ++c) sum += std::exp2(static_cast<double>(scores[(block * 64 + row) * 32 + c]));
      const float* state = &got[(block * 64 + row) * 3];
      if (sum == 0) {
        EXPECT_EQ(state[1], 0);
      } else if (row / 16 == 3 && block >= 2) {
        EXPECT_EQ(state[1], INFINITY);
      } else {
        EXPECT_NEAR(std::log2(sum), state[0] + std::log2(state[1]), 1e-4) << row << " " << block;
      }
      if (row / 16 == 0) {
        EXPECT_EQ(state[2], block > 0) << "needs no maximum";
      }
      if (row / 16 == 1) {
        EXPECT_EQ(state[2], block == 1 || block == 3);
      }
    }
  }
}

template <int kStages>
__global__ void ring_kernel(int count, int* out) {
  Ring<kStages> ring;
  for (int i = 0; i < count; ++i) ring.advance();
  out[0] = ring.stage();
  out[1] = ring.parity();
  out[2] = ring.next().stage();
  out[3] = ring.next().parity();
}

template <int kStages>
void check_ring() {
  const OnDevice<int> out(std::vector<int>(4));
  for (int count = 0; count < 20; ++count) {
    ring_kernel<kStages><<<1, 1>>>(count, out.data);
    const int next = count + 1;
    EXPECT_EQ(out.get(), (std::vector<int>{count % kStages, count / kStages % 2, next % kStages, next / kStages % 2}));
  }
}
TEST_F(TileTest, RingWalksStagesAndParities) {
  check_ring<2>();
  check_ring<3>();
  check_ring<4>();
}

}  // namespace
}  // namespace tilewise::tile
