// The Problem: what makes one legal, and the line of text that it prints and parses. parse(p.to_string()) == p for every
// legal p; parse() returns legal problems only.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <utility>

#include "core/config.h"
#include "tilewise/tilewise.hpp"

namespace tilewise {
namespace {

std::string quoted(std::string_view token) { return "token '" + std::string(token) + "'"; }

std::string_view dtype_name(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return "fp32";
    case DataType::kBFloat16:
      return "bf16";
    case DataType::kFloat16:
      return "fp16";
    case DataType::kInt32:
      return "int32";
  }
  return "unknown";
}

std::string shortest(float value) {
  char text[32];
  return {text, std::to_chars(text, std::end(text), value).ptr};
}

// Reads tokens one by one. Each names a field of the problem; a field is named once.
class Parser {
 public:
  Status take(std::string_view token) {
    const auto word = [&](std::string_view name) { return token == name; };
    const auto assigned = [&](std::string_view name) {
      return token.size() > name.size() && token.starts_with(name) && token[name.size()] == '=';
    };
    const auto counted = [&](std::string_view name) {  // "b2": the letters, then a digit
      return token.size() > name.size() && token.starts_with(name) && (is_digit(token[name.size()]) || token[name.size()] == '-');
    };
    Problem& p = problem_;
    if (word("fwd") || word("bwd")) return set(kPass, token, p.pass, word("fwd") ? Pass::kForward : Pass::kBackward);
    if (word("fp32")) return set(kDtype, token, p.dtype, DataType::kFloat32);
    if (word("bf16")) return set(kDtype, token, p.dtype, DataType::kBFloat16);
    if (word("fp16")) return set(kDtype, token, p.dtype, DataType::kFloat16);
    if (counted("b")) return integer(kBatch, token, 1, p.batch);
    if (counted("q")) return integer(kQ, token, 1, p.seqlen_q);
    if (counted("k")) return integer(kK, token, 1, p.seqlen_k);
    if (counted("h")) return pair(kHeads, token, 1, '/', p.num_heads_q, p.num_heads_kv);
    if (counted("d")) return pair(kDims, token, 1, '/', p.head_dim, p.head_dim_v);
    if (counted("tq")) return integer(kTotalQ, token, 2, p.total_q);
    if (counted("tk")) return integer(kTotalK, token, 2, p.total_k);
    if (word("causal")) return set(kWindow, token, p.window_right, int64_t{0});
    if (assigned("window")) return pair(kWindow, token, 7, ',', p.window_left, p.window_right);
    if (word("topleft")) return set(kAlignment, token, p.alignment, Alignment::kTopLeft);
    if (word("packed")) return set(kPacked, token, p.packed, true);
    if (word("seqused")) return set(kSeqused, token, p.seqused_k, true);
    if (assigned("scale")) {
      p.softmax_scale.emplace();
      return real(kScale, token, 6, *p.softmax_scale);
    }
    if (assigned("softcap")) return real(kSoftcap, token, 8, p.softcap);
    if (word("alibi")) return set(kAlibi, token, p.alibi, true);
    if (word("sink")) return set(kSink, token, p.sink, true);
    if (word("deterministic")) return set(kDeterministic, token, p.deterministic, true);
    if (word("accumulate")) return set(kAccumulate, token, p.accumulate, true);
    for (const auto& [name, example] : {std::pair("b", "b2"),
                                        {"q", "q4096"},
                                        {"k", "k4096"},
                                        {"h", "h32 or h32/8"},
                                        {"d", "d128 or d192/128"},
                                        {"tq", "tq300"},
                                        {"tk", "tk400"}})
      if (word(name)) return invalid_argument(quoted(token) + " needs a number, as in " + example);
    return invalid_argument(quoted(token) +
                            " is none of fwd bwd b q k h d fp32 bf16 fp16 causal window= topleft packed tq tk seqused scale= softcap= "
                            "alibi sink deterministic accumulate");
  }

  Result<Problem> finish() {
    if (!seen(kQ)) return invalid_argument("the problem has no q: the number of queries, as in q4096");
    if (!seen(kDims)) return invalid_argument("the problem has no d: the head dimension, as in d128 or d192/128");
    if (problem_.packed && !(seen(kTotalQ) && seen(kTotalK))) {
      return invalid_argument("packed needs tq and tk, the rows of all sequences together, as in packed tq300 tk400");
    }
    if (!seen(kK)) problem_.seqlen_k = problem_.seqlen_q;
    if (Status status = problem_.validate(); !status.ok()) return status;
    return problem_;
  }

 private:
  enum Field {
    kPass,
    kDtype,
    kBatch,
    kQ,
    kK,
    kHeads,
    kDims,
    kWindow,
    kAlignment,
    kPacked,
    kTotalQ,
    kTotalK,
    kSeqused,
    kScale,
    kSoftcap,
    kAlibi,
    kSink,
    kDeterministic,
    kAccumulate,
    kFields
  };

  static bool is_digit(char c) { return c >= '0' && c <= '9'; }
  bool seen(Field field) const { return !first_[field].empty(); }

  Status once(Field field, std::string_view token) {
    if (seen(field)) {
      const bool both = field == kWindow && (token == "causal") != (first_[field] == "causal");
      return invalid_argument(quoted(token) + " sets again what " + quoted(first_[field]) + " has set" +
                              (both ? ": window=L,0 already is causal" : ""));
    }
    first_[field] = token;
    return {};
  }

  template <class T>
  Status set(Field field, std::string_view token, T& target, T value) {
    target = value;
    return once(field, token);
  }

  // All of `text` is one number.
  template <class T>
  static Status number(std::string_view token, std::string_view text, T& target) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), target);
    if (error == std::errc::result_out_of_range) return invalid_argument(quoted(token) + " has a number that is out of range");
    if (error != std::errc() || end != text.data() + text.size()) {
      return invalid_argument(quoted(token) + " has '" + std::string(text) + "' where a number belongs");
    }
    return {};
  }

  Status integer(Field field, std::string_view token, size_t prefix, int64_t& target) {
    if (Status status = once(field, token); !status.ok()) return status;
    return number(token, token.substr(prefix), target);
  }
  Status real(Field field, std::string_view token, size_t prefix, float& target) {
    if (Status status = once(field, token); !status.ok()) return status;
    return number(token, token.substr(prefix), target);
  }
  // "h32/8" or, when both are the same, "h32"; a window always has both numbers.
  Status pair(Field field, std::string_view token, size_t prefix, char separator, int64_t& left, int64_t& right) {
    if (Status status = once(field, token); !status.ok()) return status;
    const std::string_view text = token.substr(prefix);
    const size_t middle = text.find(separator);
    if (middle == text.npos && separator == ',')
      return invalid_argument(quoted(token) + " needs two numbers, as in window=128,0 (-1: unbounded)");
    if (Status status = number(token, text.substr(0, middle), left); !status.ok()) return status;
    if (middle == text.npos) {
      right = left;
      return {};
    }
    return number(token, text.substr(middle + 1), right);
  }

  Problem problem_;
  std::string_view first_[kFields];  // the token that set a field
};

}  // namespace

Result<Problem> Problem::parse(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  Parser parser;
  for (size_t at = text.find_first_not_of(kSpace); at != text.npos;) {
    const size_t end = std::min(text.find_first_of(kSpace, at), text.size());
    if (Status status = parser.take(text.substr(at, end - at)); !status.ok()) return status;
    at = text.find_first_not_of(kSpace, end);
  }
  return parser.finish();
}

std::string Problem::to_string() const {
  std::string text = pass == Pass::kForward ? "fwd" : "bwd";
  const auto add = [&](std::string_view name, auto... values) {
    text.append(1, ' ').append(name);
    (text.append(values), ...);
  };
  const auto both = [](int64_t left, int64_t right) {
    return left == right ? std::to_string(left) : std::to_string(left) + '/' + std::to_string(right);
  };
  add("b", std::to_string(batch));
  add("q", std::to_string(seqlen_q));
  add("k", std::to_string(seqlen_k));
  add("h", both(num_heads_q, num_heads_kv));
  add("d", both(head_dim, head_dim_v));
  add(dtype_name(dtype));
  if (window_left == -1 && window_right == 0) {
    add("causal");
  } else if (window_left != -1 || window_right != -1) {
    add("window=", std::to_string(window_left), ",", std::to_string(window_right));
  }
  if (alignment == Alignment::kTopLeft) add("topleft");
  if (packed) {
    add("packed");
    add("tq", std::to_string(total_q));
    add("tk", std::to_string(total_k));
  }
  if (seqused_k) add("seqused");
  if (softmax_scale) add("scale=", shortest(*softmax_scale));
  if (softcap != 0) add("softcap=", shortest(softcap));
  if (alibi) add("alibi");
  if (sink) add("sink");
  if (deterministic) add("deterministic");
  if (accumulate) add("accumulate");
  return text;
}

Status Problem::validate() const {
  const auto refuse = [](std::string_view name, int64_t value, std::string_view rule) {
    return invalid_argument(std::string(name) + ' ' + std::to_string(value) + ' ' + std::string(rule));
  };
  if (pass != Pass::kForward && pass != Pass::kBackward)
    return refuse("pass", static_cast<int64_t>(pass), "is neither forward nor backward");
  if (dtype != DataType::kFloat32 && dtype != DataType::kBFloat16 && dtype != DataType::kFloat16) {
    return invalid_argument("dtype " + std::string(dtype_name(dtype)) + " is none of fp32, bf16 and fp16");
  }
  if (alignment != Alignment::kBottomRight && alignment != Alignment::kTopLeft) {
    return refuse("alignment", static_cast<int64_t>(alignment), "is neither bottom_right nor top_left");
  }

  if (accumulate && pass == Pass::kForward) return invalid_argument("accumulate is given, but it is for gradients and the pass is fwd");

  struct Size {
    std::string_view name;
    int64_t value, least;
  };
  for (const Size& size : {Size{"batch", batch, 0}, Size{"seqlen_q", seqlen_q, 0}, Size{"seqlen_k", seqlen_k, 0},
                           Size{"num_heads_q", num_heads_q, 1}, Size{"num_heads_kv", num_heads_kv, 1}, Size{"head_dim", head_dim, 1},
                           Size{"head_dim_v", head_dim_v, 1}, Size{"total_q", total_q, 0}, Size{"total_k", total_k, 0}}) {
    if (size.value < size.least) return refuse(size.name, size.value, size.least ? "is not positive" : "is negative");
    if (size.value > kMaxSeqlen) return refuse(size.name, size.value, "is more than " + std::to_string(kMaxSeqlen));
  }
  if (num_heads_q % num_heads_kv != 0) {
    return refuse("num_heads_q", num_heads_q, "is not a multiple of num_heads_kv " + std::to_string(num_heads_kv));
  }
  for (const Size& window : {Size{"window_left", window_left, -1}, Size{"window_right", window_right, -1}}) {
    if (window.value < -1) return refuse(window.name, window.value, "is less than -1, which means unbounded");
  }

  struct Total {
    std::string_view name, bound;
    int64_t value, seqlen;
  };
  for (const Total& total : {Total{"total_q", "seqlen_q", total_q, seqlen_q}, Total{"total_k", "seqlen_k", total_k, seqlen_k}}) {
    if (!packed && total.value != 0) return refuse(total.name, total.value, "is given, but the problem is not packed");
    if (packed && total.value > batch * total.seqlen) {
      return refuse(
          total.name, total.value,
          "is more than batch " + std::to_string(batch) + " times " + std::string(total.bound) + ' ' + std::to_string(total.seqlen));
    }
  }

  if (softmax_scale && !std::isfinite(*softmax_scale))
    return invalid_argument("softmax_scale " + shortest(*softmax_scale) + " is not finite");
  if (!std::isfinite(softcap)) return invalid_argument("softcap " + shortest(softcap) + " is not finite");
  if (softcap < 0) return invalid_argument("softcap " + shortest(softcap) + " is negative");

  // Offsets in bytes of float32 stay inside 64 bits, as do the counts of rows that kernels keep.
  struct Extent {
    std::string_view name;
    int64_t rows, heads, dim;
  };
  const int64_t rows_q = packed ? total_q : batch * seqlen_q, rows_k = packed ? total_k : batch * seqlen_k;
  for (const Extent& extent : {Extent{"q", rows_q, num_heads_q, head_dim}, Extent{"k", rows_k, num_heads_kv, head_dim},
                               Extent{"v", rows_k, num_heads_kv, head_dim_v}, Extent{"o", rows_q, num_heads_q, head_dim_v}}) {
    int64_t elements = 0;
    if (__builtin_mul_overflow(extent.rows, extent.heads, &elements) || __builtin_mul_overflow(elements, extent.dim, &elements) ||
        elements > (INT64_MAX >> 8)) {
      return invalid_argument(std::string(extent.name) + " of " + std::to_string(extent.rows) + " rows, " + std::to_string(extent.heads) +
                              " heads and " + std::to_string(extent.dim) + " dimensions has more elements than " +
                              std::to_string(INT64_MAX >> 8));
    }
  }
  return {};
}

float Problem::scale() const { return softmax_scale ? *softmax_scale : 1.0f / std::sqrt(static_cast<float>(head_dim)); }

}  // namespace tilewise
