// Any CPU: SSE2 on x86-64, vector extensions elsewhere.
#define SMART_FAST_ISA portable
#define SMART_FAST_LANES 4
#include "kernels_body.h"
