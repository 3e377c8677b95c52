// Results that must agree in every bit: for any number of threads, any company in the batch, any strides.
#include <gtest/gtest.h>

#include "common.h"

namespace tilewise {
namespace {

using reference::Layout;

struct Bitwise : Cpu {};
INSTANTIATE_TEST_SUITE_P(Isa, Bitwise, testing::ValuesIn(isas()), isa_name);

constexpr const char* kLines[] = {
    " b2 q150 k200 h4/2 d64 fp32 causal",
    " b1 q300 k300 h2/1 d40 bf16 sink",
    " b3 q50 k90 h6/3 d33/20 fp16 window=30,10 alibi",
    " b5 q60 k60 h2 d32 fp32 packed tq170 tk160 causal seqused softcap=4",
    " b1 q5 k2000 h4/1 d128 fp32 causal",
    " b1 q1100 k700 h1 d16 fp32",
    " q70 k5000 h1 d16 fp32 causal",  // many blocks of keys in backward, in rounds where threads are few
    " q70 k5000 h2/1 d16 bf16 window=900,3",
    " b3 q33 k4500 h1 d16 fp32 packed tq80 tk9000",
};

TEST_P(Bitwise, AnyNumberOfThreads) {
  for (const char* pass : {"fwd", "bwd"})
    for (const char* line : kLines) {
      SCOPED_TRACE(std::string(pass) + line);
      HostTrial t(parse(std::string(pass) + line), 3);
      const auto expected = t.run_bits(1);
      for (int threads : {2, 3, 7, 7, 7}) EXPECT_EQ(t.run_bits(threads), expected) << threads << " threads";
    }
}

TEST_P(Bitwise, AnyStrides) {
  for (const char* pass : {"fwd", "bwd"})
    for (const char* line : kLines) {
      SCOPED_TRACE(std::string(pass) + line);
      const auto expected = HostTrial(parse(std::string(pass) + line), 3, Layout::kBshd).run_bits();
      for (Layout layout : {Layout::kBhsd, Layout::kGaps, Layout::kPermuted})
        EXPECT_EQ(HostTrial(parse(std::string(pass) + line), 3, layout).run_bits(), expected) << layout_name(layout);
    }
}

// [batch, rows, heads, dim] cut to one batch index and a run of rows, still in place.
TensorView part_of(TensorView view, int64_t b, int64_t begin, int64_t rows) {
  if (!view) return view;
  view.data = static_cast<char*>(view.data) + (b * view.stride[0] + begin * view.stride[1]) * reference::element_bytes(view.dtype);
  view.shape[0] = 1, view.shape[1] = rows;
  return view;
}
// [batch, heads, rows]
TensorView part_of_lse(TensorView view, int64_t b, int64_t begin, int64_t rows) {
  if (!view) return view;
  view.data = static_cast<float*>(view.data) + b * view.stride[0] + begin * view.stride[2];
  view.shape[0] = 1, view.shape[2] = rows;
  return view;
}

TEST_P(Bitwise, ASequenceAloneIsTheSequenceInABatch) {
  for (const char* line :
       {"fwd b3 q150 k200 h4/2 d64 fp32 causal", "bwd b3 q150 k200 h4/2 d64 fp32 causal", "fwd b4 q33 k90 h2/1 d40 bf16 sink",
        "bwd b4 q33 k90 h2/1 d40 bf16", "bwd b9 q40 k600 h1 d16 fp32", "bwd b3 q700 k700 h1 d16 fp16 window=50,0",
        "fwd b2 q70 k5000 h1 d16 fp32 causal", "bwd b2 q70 k5000 h1 d16 fp32 causal", "bwd b9 q70 k5000 h2/1 d16 bf16 window=900,3"}) {
    SCOPED_TRACE(line);
    const Problem p = parse(line);
    HostTrial t(p, 6);
    t.run_bits();
    const Arguments& a = t.arguments();
    for (int64_t b = 0; b < p.batch; ++b) {
      std::vector<std::vector<uint32_t>> expected;
      Arguments one = a;
      one.q = part_of(a.q, b, 0, p.seqlen_q), one.o = part_of(a.o, b, 0, p.seqlen_q), one.do_ = part_of(a.do_, b, 0, p.seqlen_q);
      one.dq = part_of(a.dq, b, 0, p.seqlen_q);
      for (auto member : {&Arguments::k, &Arguments::v, &Arguments::dk, &Arguments::dv}) one.*member = part_of(a.*member, b, 0, p.seqlen_k);
      one.lse = part_of_lse(a.lse, b, 0, p.seqlen_q), one.dlse = part_of_lse(a.dlse, b, 0, p.seqlen_q);
      Problem alone = p;
      alone.batch = 1;
      for (const TensorView& output : outputs_of(alone, one)) expected.push_back(bits_of(output));
      run(alone, one);
      size_t n = 0;
      for (const TensorView& output : outputs_of(alone, one))
        EXPECT_EQ(bits_of(output), expected[n++]) << "batch " << b << " output " << n - 1;
    }
  }
}

TEST_P(Bitwise, AQueryAloneIsTheQueryAmongOthers) {
  for (const char* line : {"fwd q150 k200 h4/2 d64 fp32", "fwd q70 k333 h3 d40 bf16", "fwd q41 k64 h8/1 d128 fp16 softcap=5"}) {
    SCOPED_TRACE(line);
    const Problem p = parse(line);
    HostTrial t(p, 6);
    t.run_bits();
    const Arguments& a = t.arguments();
    Problem alone = p;
    alone.seqlen_q = 1;
    for (int64_t i = 0; i < p.seqlen_q; i += 7) {
      Arguments one = a;
      one.q = part_of(a.q, 0, i, 1), one.o = part_of(a.o, 0, i, 1), one.lse = part_of_lse(a.lse, 0, i, 1);
      const auto o = bits_of(one.o), lse = bits_of(one.lse);
      run(alone, one);
      EXPECT_EQ(bits_of(one.o), o) << "query " << i;
      EXPECT_EQ(bits_of(one.lse), lse) << "query " << i;
    }
  }
}

TEST_P(Bitwise, PackedIsALoopOverSequences) {
  for (const char* line :
       {"fwd b6 q130 k170 h4/2 d64 fp32 packed tq300 tk310 causal", "bwd b6 q130 k170 h4/2 d64 fp32 packed tq300 tk310 causal",
        "bwd b4 q50 k600 h2 d24 bf16 packed tq120 tk900 window=40,3", "bwd b5 q70 k70 h3/1 d16 fp16 packed tq200 tk200 alibi",
        "fwd b3 q33 k4500 h1 d16 fp32 packed tq80 tk9000", "bwd b3 q33 k4500 h1 d16 fp32 packed tq80 tk9000",
        "bwd b9 q33 k4500 h2/1 d16 bf16 packed tq200 tk20000 causal"}) {
    SCOPED_TRACE(line);
    const Problem p = parse(line);
    HostTrial t(p, 6);  // with rows before and after the sequences
    t.run_bits();
    const Arguments& a = t.arguments();
    const int32_t* cu_q = static_cast<const int32_t*>(a.cu_seqlens_q.data);
    const int32_t* cu_k = static_cast<const int32_t*>(a.cu_seqlens_k.data);
    for (int64_t b = 0; b < p.batch; ++b) {
      Problem dense = p;
      dense.packed = false, dense.batch = 1, dense.total_q = dense.total_k = 0;
      dense.seqlen_q = cu_q[b + 1] - cu_q[b], dense.seqlen_k = cu_k[b + 1] - cu_k[b];
      const auto rows = [](TensorView view, int64_t begin, int64_t count) {
        if (!view) return view;
        view.data = static_cast<char*>(view.data) + begin * view.stride[0] * reference::element_bytes(view.dtype);
        view.rank = 4, view.shape = {1, count, view.shape[1], view.shape[2]}, view.stride = {0, view.stride[0], view.stride[1], 1};
        return view;
      };
      const auto lse = [&](TensorView view) {
        if (!view) return view;
        view.data = static_cast<float*>(view.data) + cu_q[b];
        view.rank = 3, view.shape = {1, view.shape[0], dense.seqlen_q}, view.stride = {0, view.stride[0], 1};
        return view;
      };
      Arguments one = a;
      one.cu_seqlens_q = one.cu_seqlens_k = {};
      for (auto member : {&Arguments::q, &Arguments::o, &Arguments::do_, &Arguments::dq})
        one.*member = rows(a.*member, cu_q[b], dense.seqlen_q);
      for (auto member : {&Arguments::k, &Arguments::v, &Arguments::dk, &Arguments::dv})
        one.*member = rows(a.*member, cu_k[b], dense.seqlen_k);
      one.lse = lse(a.lse), one.dlse = lse(a.dlse);
      if (a.alibi_slopes.rank == 2) {
        one.alibi_slopes.data = static_cast<float*>(a.alibi_slopes.data) + b * a.alibi_slopes.stride[0];
        one.alibi_slopes.shape[0] = 1;
      }
      std::vector<std::vector<uint32_t>> expected;
      for (const TensorView& output : outputs_of(dense, one)) expected.push_back(bits_of(output));
      run(dense, one);
      size_t n = 0;
      for (const TensorView& output : outputs_of(dense, one))
        EXPECT_EQ(bits_of(output), expected[n++]) << "sequence " << b << " output " << n - 1;
    }
  }
}

}  // namespace
}  // namespace tilewise
