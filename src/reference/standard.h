// Standard attention as the textbook does it: the whole matrix of scores in memory. S = QK^T is stored for every batch,
// head, query and key in the tensors' element type, softmax turns it into P in place, O = PV; backward keeps P and makes
// dP, then dS, of the same size. Every stored tensor is rounded to the element type, sums are float32. It is both the
// thing to beat and the same-precision computation that errors are measured against, so it is written to be fast.
#pragma once

#include <cstdint>
#include <memory>

#include "tilewise/tilewise.hpp"

namespace tilewise::reference {

// Memory beyond the caller's tensors, known before any of it is taken: S (and for the backward pass dP).
int64_t standard_bytes(const Problem& problem);
// What this process may still take: of the machine, and of its group's limit.
int64_t available_bytes();

class Standard {
 public:
  // kUnavailable where this machine has not the memory. Threads: 0 takes every core.
  static Result<Standard> make(const Problem& problem, int threads = 0);
  Standard(Standard&&) noexcept;
  Standard& operator=(Standard&&) noexcept;
  ~Standard();

  // Writes o and, where given, lse. Leaves P in memory.
  Status forward(const Arguments& arguments);
  // Writes (or adds to, where the problem says accumulate) dq, dk, dv and, where given, writes dsink, from the P of the last forward();
  // destroys nothing of it.
  Status backward(const Arguments& arguments);

 private:
  struct State;
  explicit Standard(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tilewise::reference
