// What one core of this instruction set multiplies and adds at most, and the table of the set's kernels.
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tilewise::cpu::TW_ISA {

void multiply_add(int64_t repeats) {
  const F d;
  constexpr int kChains = kManyRegisters ? 24 : 12;
  V acc[kChains];
  TW_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = hn::Set(d, static_cast<float>(i) * 1e-3f);
  V x = hn::Set(d, 0.999f), y = hn::Set(d, 1e-4f);
  for (int64_t k = 0; k < repeats * (48 / kChains); ++k) {
    TW_UNROLL
    for (int i = 0; i < kChains; ++i) acc[i] = hn::MulAdd(acc[i], x, y);
  }
  V sum = acc[0];
  TW_UNROLL
  for (int i = 1; i < kChains; ++i) sum = hn::Add(sum, acc[i]);
  volatile float sink = hn::GetLane(sum);  // keeps the loop
  (void)sink;
}

extern const Isa kIsa;
const Isa kIsa = {
#define TW_STRING_OF(x) #x
#define TW_STRING(x) TW_STRING_OF(x)
    TW_STRING(TW_ISA), kLanes,        forward_scratch, forward_item, backward_scratch,
    backward_delta,    backward_item, backward_add,    backward_dq,  multiply_add};

}  // namespace tilewise::cpu::TW_ISA
HWY_AFTER_NAMESPACE();
