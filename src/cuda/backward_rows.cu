// The backward kernels of one shape, TW_SHAPE.
#include "cuda/backward_rows.h"
#include "cuda/kernels/backward_roles.cuh"
#include "cuda/kernels/preprocess.cuh"

namespace tilewise::cuda {
namespace {

template <class Shape, ptx::Element kElement, bool kModified>
struct Row {
  static constexpr BackwardConfig make() {
    BackwardConfig config = Shape::kShape;
    config.element = kElement;
    config.modified = kModified;
    if (kModified) config.addends = false;  // the cap comes between
    return config;
  }
  static constexpr BackwardConfig kConfig = make();
  static const void* kernel() {
    if constexpr (kConfig.pair)
      return reinterpret_cast<const void*>(backward_roles<Row>);
    else
      return reinterpret_cast<const void*>(backward_sm90<Row>);
  }
  static BackwardRow row() {
    return {kConfig,
            kSharedBytes<kConfig>,
            kernel(),
            reinterpret_cast<const void*>(backward_preprocess<kElement, kConfig.head_dim_v>),
            reinterpret_cast<const void*>(backward_preprocess_rest<kElement, kConfig.head_dim_v>),
            reinterpret_cast<const void*>(backward_postprocess<kElement>)};
  }
};

}  // namespace

template <>
std::array<BackwardRow, 4> backward_rows<TW_SHAPE>() {
  using ptx::Element;
  return {Row<TW_SHAPE, Element::kBFloat16, false>::row(), Row<TW_SHAPE, Element::kBFloat16, true>::row(),
          Row<TW_SHAPE, Element::kFloat16, false>::row(), Row<TW_SHAPE, Element::kFloat16, true>::row()};
}

}  // namespace tilewise::cuda
