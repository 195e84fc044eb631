// Errors of the core. Python validates a user's arguments; these catch what only the core can see.
#pragma once

#include <stdexcept>
#include <string>

#define LIMPET_CHECK(condition, message)                                             \
  do {                                                                               \
    if (!(condition)) throw std::runtime_error(std::string("limpet: ") + (message)); \
  } while (0)
