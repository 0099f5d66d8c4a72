// Nothing of this header is needed; see context.h.
#pragma once
#include "../context.h"
