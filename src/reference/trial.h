// One problem made concrete on a device, run by the library and judged against float64, by the rule that its error is at
// most twice that of standard attention in the same precision (Trial::compare has it in numbers). Everything follows from (problem, seed,
// layout), so one line repeats a failure. Outputs start as NaN; margins, gaps between strides, rows before and after the sequences (one
// seed of five has them) and keys that nobody sees are NaN too, and every byte that is not an output must be found as it was.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tilewise/explain.hpp"
#include "tilewise/memory.hpp"
#include "tilewise/tilewise.hpp"

namespace tilewise::reference {

// Order of the dimensions in memory; head_dim is always innermost and contiguous.
enum class Layout {
  kBshd,      // [batch, seqlen, heads, head_dim], no gaps
  kBhsd,      // [batch, heads, seqlen, head_dim], no gaps
  kGaps,      // bshd with 16 bytes or more of gap after every row, first element aligned to 16 bytes
  kPermuted,  // [heads, seqlen, batch, head_dim] with gaps of an odd number of elements and an odd first element
};
std::string_view layout_name(Layout layout);  // "bshd", "bhsd", "gaps", "permuted"
Result<Layout> parse_layout(std::string_view name);

// Errors of one output against float64, beside those of standard attention in the same precision.
struct TensorReport {
  std::string name;                                              // o lse dq dk dv dsink
  double max = 0, mean = 0, mean_signed = 0, rel_frobenius = 0;  // of the library
  double standard_max = 0, standard_mean = 0;                    // of standard attention; NaN where it could not run
  bool pass = true;
  std::string reason;  // why not
};
struct Report {
  std::vector<TensorReport> tensors;
  bool pass = true;
  std::string first_failure;  // one sentence, empty if it passed
};

class Trial {
 public:
  // Makes the plan, draws the data and places it on the device. No reference is computed yet.
  static Result<Trial> make(const Problem& problem, const Device& device, uint64_t seed = 0, Layout layout = Layout::kBshd);
  Trial(Trial&&) noexcept;
  Trial& operator=(Trial&&) noexcept;
  ~Trial();

  const Plan& plan() const;
  const Arguments& arguments() const;       // on the device, ready for plan().run()
  const Arguments& host_arguments() const;  // the same tensors in host memory, free to edit before upload()
  Lengths lengths() const;                  // of the sequences drawn: empty vectors where the problem fixes them

  Status upload();    // host to device; outputs and workspace are poisoned again
  Status run();       // plan().run() and synchronize()
  Status download();  // outputs to host_arguments()
  // After run(): downloads and judges. Canaries and unwritten elements are failures, errors of the machine a Status.
  // With u the unit roundoff of the element type (of float32 for lse) and the noise of an element what one rounding in every
  // term of its sums comes to (attention.h), each output must keep, over its elements that float64 makes finite,
  //   max |error| <= 2 * max |standard error| + 16 u * max noise,   mean |error| <= 2 * mean |standard error| + 6 u * mean noise
  // and be the same NaN or infinity where float64 is. Where memory is too small for standard attention: mean |error| <= 8 u *
  // mean noise. In float32, o and dv must also have |error| < 2e-6 |value| (Frobenius) if every finite lse is within +-12,
  // which default scales and drawn data never leave; dq and dk are differences and have no such bound. Gradients that are added to
  // normal numbers are rounded at the sum's size, for which max has 2^-23 (8 + max |value|) more, mean 2^-24 (1 + mean |value|); they have
  // no Frobenius bound.
  Result<Report> compare();

 private:
  struct State;
  explicit Trial(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// make, run, compare.
Result<Report> verify(const Problem& problem, const Device& device, uint64_t seed = 0, Layout layout = Layout::kBshd);

// [TILEWISE_KERNEL=... where it is set] tilewise verify "<problem>" --seed N --layout X
std::string verify_line(const Problem& problem, uint64_t seed, Layout layout = Layout::kBshd);

// A legal problem drawn from the seed: every feature alone and in combination, small enough for float64.
struct FuzzLimits {
  double max_products = 2e6;  // of batch * heads * seqlen_q * seqlen_k * head_dim
  int64_t max_seqlen = 512;
  int64_t max_head_dim = 512;
  bool backward = true;
};
Problem random_problem(uint64_t seed, const FuzzLimits& limits = {});
Layout random_layout(uint64_t seed);

}  // namespace tilewise::reference
