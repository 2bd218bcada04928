/*
 * text.hpp: how the shim's errors speak: tensors, ranks, and the texts of inner backends put into a sentence of ours.
 */
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

namespace dssync {

std::string dtypeName(at::ScalarType dtype);                         // "float32"
std::string describeTensors(const std::vector<at::Tensor> &tensors); // "float32[2, 3]", "3 tensors, first float32[2, 3]", ""
std::string describeRanks(const std::vector<uint32_t> &ranks);       // "[0, 3]"
std::string describeSeconds(std::chrono::milliseconds duration);     // "30 s", "0.5 s"

// The text of an exception without the C++ stack that c10 appends.
std::string exceptionText(const std::exception_ptr &error);

bool isTimeout(const std::string &text);

std::string asSentence(const std::string &text); // ends in one full stop
// What to do about a failure of the given text, with a space before it; "" where only the text itself can tell.
std::string adviceFor(const std::string &text);

// The same exception with `text` in place of its own, of the type that users of the inner backend catch.
std::exception_ptr withText(const std::exception_ptr &error, const std::string &text);

} // namespace dssync
