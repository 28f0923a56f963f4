// Lets a program say which of its instructions callgrind counts. Does nothing outside valgrind.
#include <valgrind/callgrind.h>

void guard_begin(void) {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

void guard_end(const char *name) {
  CALLGRIND_DUMP_STATS_AT(name);
  CALLGRIND_STOP_INSTRUMENTATION;
}
