// The kernels of one shape, TW_SHAPE.
#include "cuda/forward_rows.h"
#include "cuda/kernels/forward_sm90.cuh"

namespace tilewise::cuda {
namespace {

template <class Shape, ptx::Element kElement, bool kModified>
struct Row {
  static constexpr ForwardConfig make() {
    ForwardConfig config = Shape::kShape;
    config.element = kElement;
    config.modified = kModified;
    if (kModified && config.consumers == 3) config.block_n = 96;  // modifying takes registers, of which three have fewer each
    return config;
  }
  static constexpr ForwardConfig kConfig = make();
  static ForwardRow row() { return {kConfig, sizeof(ForwardShared<kConfig>), reinterpret_cast<const void*>(forward_sm90<Row>)}; }
};

}  // namespace

template <>
std::array<ForwardRow, 4> forward_rows<TW_SHAPE>() {
  using ptx::Element;
  return {Row<TW_SHAPE, Element::kBFloat16, false>::row(), Row<TW_SHAPE, Element::kBFloat16, true>::row(),
          Row<TW_SHAPE, Element::kFloat16, false>::row(), Row<TW_SHAPE, Element::kFloat16, true>::row()};
}

}  // namespace tilewise::cuda
