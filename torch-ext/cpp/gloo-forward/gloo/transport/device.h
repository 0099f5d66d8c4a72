// Empty: the bindings need no declaration of this header; see context.h.
#pragma once
#include "../context.h"
