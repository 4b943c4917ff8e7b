// Sums are float, and double where the data is.
#pragma once

#include <type_traits>

namespace hearken {

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace hearken
