// Memory that the host and a GPU share, and the updates that run on it beside the steps.
#pragma once

#include "cuda_common.h"
#include "update_pages.h"

namespace retro {

// Has the worker pool update a layer once everything before on the current stream is done. Nothing waits for it.
// The tensors must be host tensors; the layer's job is made at its first call.
void post_update(const char* op, const Launcher& launch, const Call<UpdatePagesParams>& call);

// While the stream is being captured: what was posted so far becomes part of the capture's end. Without it the
// capture is refused (error 904). Elsewhere nothing.
void join_updates(const Launcher& launch);

}  // namespace retro
