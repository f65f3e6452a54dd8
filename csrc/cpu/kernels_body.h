// Every kernel, for one instruction set.
#include "ascend.h"
#include "divergence_kernels.h"
#include "fisher.h"
#include "kernels.h"
#include "perturb.h"

namespace smart_fast {
namespace cpu {

#define SMART_FAST_QUOTE_(name) #name
#define SMART_FAST_QUOTE(name) SMART_FAST_QUOTE_(name)

const Kernels SMART_FAST_ISA = {
    SMART_FAST_QUOTE(SMART_FAST_ISA), perturb, measure, ascend, divergence_forward, divergence_parts,
    divergence_finish, divergence_backward, divergence_elements_backward, fisher_direction,
};

}  // namespace cpu
}  // namespace smart_fast
