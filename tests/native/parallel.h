#pragma once

// Whether this thread is inside of an OpenMP region.
bool in_parallel();
