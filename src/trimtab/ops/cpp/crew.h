// Loops that the threads of a team share.
//
// On a quiet machine OpenMP's threads each take an equal part and wait for each other at the end. Beside busy processes a part waits until its
// thread has a core again, and so does the team. Then a crew shares the loop: whoever has a core takes the next few indices, and does all that
// are left while the others have none. No result depends on who computes an index.

#pragma once

#include <omp.h>

#include <cstdint>

// Whether other processes want our cores; see crowd.cpp.
bool crowded();

struct Crew;
bool in_crew();  // whether the calling thread is one of a crew

// The indices 0 .. count of a loop as they come to the calling thread. Every thread of the team goes through the same loops in the same
// order. What a loop reads besides its own work may be read only between two calls of `next`: a thread that comes late finds others already
// in later loops, and gets no indices. work: of an index, in multiplications or what takes as long.
struct Loop {
    Loop(int64_t count, int64_t work);
    // The next indices; false after the last ones, when all threads' are done.
    bool next(int64_t& from, int64_t& to);

  private:
    Crew* const crew;
    const int64_t count;
    int64_t each, taken = 0;
};

// `work` of an index that is a taking by itself.
const int64_t WHOLE_TAKING = int64_t(1) << 40;

template <class F> static inline void share(int64_t count, int64_t work, F f) {
    Loop loop(count, work);
    for (int64_t from, to; loop.next(from, to);)
        for (int64_t i = from; i < to; i++) f(i);
}

// Whether the calling thread's crew has done f (given). False: f was not called, by anyone: the machine is quiet, or the crew has other work.
bool crew_runs(void (*f)(void*), void* given);

// Run f on every thread of a team: a kernel's loops, or those of several.
template <class F> static inline void as_team(bool many, F f) {
    if (many && crowded() && crew_runs([](void* given) { (*(F*)given)(); }, &f)) return;
#pragma omp parallel if (many)
    f();
}
