// The 16-bit types that the tensor cores multiply.
#pragma once

namespace tilewise::ptx {

enum class Element { kBFloat16, kFloat16 };

}  // namespace tilewise::ptx
