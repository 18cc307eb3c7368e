// In rank tests built with sanitizers only. What Open MPI keeps until the process ends is told from our leaks
// by the libraries it was allocated in (lsan.supp): these have to stay loaded, and whole call stacks to be
// known.

extern "C" int dlclose(void* /*library*/) { return 0; }
extern "C" const char* __asan_default_options() { return "fast_unwind_on_malloc=0"; }
