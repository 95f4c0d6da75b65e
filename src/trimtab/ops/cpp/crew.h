// Loops that the threads of a team share.
//
// On a quiet machine OpenMP's threads each take an equal part and wait for each other at the end. Beside busy processes a part waits until its
// thread has a core again, and so does the team. Then a crew shares the loop: whoever has a core takes the next few indices, and does all that
// are left while the others have none. No result depends on who computes an index.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

// Whether other processes want our cores; see crowd.cpp.
bool crowded();

struct Crew;
bool in_crew();  // whether the calling thread is one of a crew

// The indices 0 .. count of a loop as they come to the calling thread. Every thread of the team goes through the same loops in the same
// order. work: of an index, in multiplications or what takes as long. `next` gives the next indices; it is false after the last ones, when all
// threads' are done.
//
// Part: of OpenMP, one equal part for each thread.
struct Part {
    Part(int64_t count, int64_t) : count(count) {}
    inline bool next(int64_t& from, int64_t& to) {
        if (taken) {
#pragma omp barrier
            return false;
        }
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num(), each = count / team, more = count % team;
        from = each * me + std::min(me, more), to = from + each + (me < more), taken = true;
        return true;
    }

  private:
    const int64_t count;
    bool taken = false;
};

// Of a crew. What a loop reads besides its own work may be read only between two calls of `next`: a thread that comes late finds others already
// in later loops, and gets no indices.
struct Takings {
    Takings(int64_t count, int64_t work);
    bool next(int64_t& from, int64_t& to);

  private:
    const int64_t count, each;
    int64_t taken = 0;
};

// `work` of an index that is a taking by itself.
const int64_t WHOLE_TAKING = int64_t(1) << 40;

// Not inlined: a team and a crew run the same code. In two places GCC might add in two orders, and results would depend on the neighbours.
template <class F> __attribute__((noinline)) void indices(const F& f, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) f(i);
}

template <class L, class F> static inline void share_as(int64_t count, int64_t work, const F& f) {
    L loop(count, work);
    for (int64_t from, to; loop.next(from, to);) indices(f, from, to);
}

template <class F> static inline void share(int64_t count, int64_t work, const F& f) {
    in_crew() ? share_as<Takings>(count, work, f) : share_as<Part>(count, work, f);
}

// Whether the calling thread's crew has done f (given). False: f was not called, by anyone: the machine is quiet, or the crew has other work.
bool crew_runs(void (*f)(void*), void* given) noexcept;

// Run f on every thread of a team: a kernel's loops, or those of several.
template <class F> static inline void as_team(bool many, F f) {
    if (many && crowded() && crew_runs([](void* given) { (*(F*)given)(); }, &f)) return;
#pragma omp parallel if (many)
    f();
}
