// Errors are values. A message names the argument, its value and the rule it breaks:
// "num_heads_q 30 is not a multiple of num_heads_kv 8". The library never prints, aborts or exits.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <variant>

namespace tilewise {

enum class StatusCode {
  kOk = 0,
  kInvalidArgument = 1,  // the caller's mistake: no machine could run this
  kUnsupported = 2,      // a legal problem that no kernel here accepts
  kUnavailable = 3,      // a device, driver or amount of memory that is not there
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}
  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  // For those who prefer exceptions.
  void check() const {
    if (!ok()) throw std::runtime_error(message_);
  }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status invalid_argument(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }
inline Status unsupported(std::string message) { return {StatusCode::kUnsupported, std::move(message)}; }
inline Status unavailable(std::string message) { return {StatusCode::kUnavailable, std::move(message)}; }

// A value or the reason why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}
  Result(Status status) : state_(std::move(status)) {}
  bool ok() const { return std::holds_alternative<T>(state_); }
  explicit operator bool() const { return ok(); }
  Status status() const { return ok() ? Status() : std::get<Status>(state_); }
  // The value; throws std::runtime_error with the message where there is none.
  T& value() & {
    status().check();
    return std::get<T>(state_);
  }
  const T& value() const& {
    status().check();
    return std::get<T>(state_);
  }
  T value() && {
    status().check();
    return std::move(std::get<T>(state_));
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::variant<T, Status> state_;
};

}  // namespace tilewise
