// What NVRTC lacks of the C++ library and of the CUDA runtime's host side. It gets every function without a
// mark as one of the device; those of the host are parsed, and none is called.
#pragma once

using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;

namespace std {

template <class T, T value_>
struct integral_constant {
    static constexpr T value = value_;
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;

template <class, class>
constexpr bool is_same_v = false;
template <class T>
constexpr bool is_same_v<T, T> = true;

template <bool, class Yes, class>
struct conditional {
    using type = Yes;
};
template <class Yes, class No>
struct conditional<false, Yes, No> {
    using type = No;
};
template <bool condition, class Yes, class No>
using conditional_t = typename conditional<condition, Yes, No>::type;

template <class T>
struct remove_reference {
    using type = T;
};
template <class T>
struct remove_reference<T&> {
    using type = T;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;

template <class T>
T max(T, T);
template <class T>
T max(initializer_list<T>);
template <class T>
T min(T, T);
template <class T>
T clamp(T, T, T);
template <class T>
T gcd(T, T);
template <class In, class Out>
Out copy(In, In, Out);

}  // namespace std

#define NASFAST_KERNEL(...) 0

namespace nasfast::cuda {

template <class... Arguments>
void launch(const Arguments&...);
int multiprocessors();
void refuse(const char* what, int64_t got, const char* remedy);

}  // namespace nasfast::cuda
