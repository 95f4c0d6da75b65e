// The crew of crew.h: how threads share loops beside processes that never rest.
//
// Two threads that wait for each other get less than their share of the cores. One that sleeps until the other has a core again is not given
// the time later. So no thread waits for one that has no core. What makes this possible is where a thread loses it: Linux takes a core from a
// thread that does not sleep at the tick of its clock, every 4 ms with HZ=250. Just before a tick a thread takes no more indices and waits until the
// tick is over. If it then loses its core, it holds nothing that others wait for. They go on without it, through the end of this call if need
// be, and when it is back it goes on where they are.

#include "crew.h"

#include "common.h"

#ifdef __linux__
#include <fenv.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

namespace {

const int64_t GRAIN = 100000;          // of `work` in one taking: some 5 microseconds
const int64_t MOST_TAKINGS = 1 << 16;  // of a loop
const uint64_t LOOPS = uint64_t(1) << 40;
const int64_t LATE_NS = 6000;          // by which a tick may be late
const int64_t LEAST_NS = 5000, MOST_NS = 100000;  // before a tick, without new indices
const int64_t SPIN_NS = 30000;         // of a wait; then it sleeps
const int MOST_HELPERS = 255;

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Ticks come at whole multiples of this on the clock of `now`.
int64_t tick() {
    static const int64_t found = [] {
        timespec t;
        return clock_getres(CLOCK_MONOTONIC_COARSE, &t) == 0 && t.tv_sec == 0 && t.tv_nsec >= 500000 ? int64_t(t.tv_nsec) : int64_t(4000000);
    }();
    return found;
}

inline void rest() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

typedef std::atomic<uint32_t> Word;
void sleep_while(Word& word, uint32_t value) { syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0); }
void wake_all(Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0); }

struct Over {};  // the work is done without the thread that throws it

struct Helper {
    alignas(64) std::atomic<bool> inside{false};  // whether it may read what belongs to the work
};

}  // namespace

// `state`: the number of the loop that is shared, and how many takings of it are taken: loop << 24 | takings. Numbers of loops are used
// again after LOOPS, which no thread sleeps through.
struct Crew {
    alignas(64) std::atomic<uint64_t> state{0};
    alignas(64) std::atomic<int64_t> done{0};  // takings of this loop
    alignas(64) Word loop{0};                  // the lower bits of its number, to sleep on
    Word sleepers{0};
    alignas(64) Word work{0};                  // the number of the last work that was begun, to sleep on
    std::atomic<uint32_t> open{0};             // the number of the work that is going on, or 0
    std::atomic<uint64_t> first{0};            // its first loop
    void (*f)(void*) = nullptr;
    void* given = nullptr;
    fenv_t rounding;  // and what becomes of denormal numbers, as the thread that calls has it
    std::atomic_flag taken = ATOMIC_FLAG_INIT;
    pid_t process = getpid();
    std::atomic<int> count{0}, wanted{0};  // helpers that there are, and that may take part now
    Helper helpers[MOST_HELPERS];

    void begin(void (*function)(void*), void* argument);
    void end();
    void help(Helper& me);
    void enter(Helper& me, uint32_t number);
    void safe_point();
    bool over(uint64_t mine) const { return state.load() >> 24 != mine; }
    void wait(uint64_t mine);
    void after(uint64_t mine);
    bool take(int64_t takings, int64_t& found);
    void finish(int64_t takings);
};

namespace {

std::atomic<int64_t> works{0};

// What a thread of a crew knows.
thread_local Crew* my_crew = nullptr;
thread_local Helper* my_helper = nullptr;  // null: it called
thread_local uint32_t my_work = 0;
thread_local uint64_t my_loop = 0;
thread_local int64_t took_at = 0, margin = LEAST_NS;

struct Recruit {
    Crew* crew;
    Helper* helper;
};

void* recruit(void* given) {
    const Recruit r = *(Recruit*)given;
    delete (Recruit*)given;
    my_crew = r.crew, my_helper = r.helper;
    r.crew->help(*r.helper);
    return nullptr;
}

bool start_helper(Crew* crew) {
    sigset_t all, before;
    sigfillset(&all);
    auto* given = new Recruit{crew, &crew->helpers[crew->count.load()]};
    pthread_t thread;
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool started = pthread_create(&thread, nullptr, recruit, given) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!started) return delete given, false;
    pthread_detach(thread);
    crew->count++;
    return true;
}

// This process's crew, or null. Not freed: its threads wait in it when the process ends. A fork has none of its threads, and makes its own.
Crew* the_crew() {
    static std::atomic<Crew*> crew{nullptr};
    Crew* found = crew.load();
    while (!found || found->process != getpid()) {
        Crew* made = new Crew;
        if (crew.compare_exchange_strong(found, made)) return made;
        delete made;
    }
    return found;
}

}  // namespace

void Crew::begin(void (*function)(void*), void* argument) {
    fegetenv(&rounding);
    f = function, given = argument, my_loop = state.load() >> 24;
    first.store(my_loop);
    uint32_t number = work.load() + 1;
    if (number == 0) number = 1;
    open.store(number);
    work.store(number);
    wake_all(work);
}

// From now on no helper reads what belongs to the work.
void Crew::end() {
    open.store(0);
    for (int i = 0; i < count.load(); i++)
        for (int64_t since = now(); helpers[i].inside.load();)
            if (now() - since > SPIN_NS) {
                const timespec time{0, 50000};
                nanosleep(&time, nullptr);
            }
}

void Crew::enter(Helper& me, uint32_t number) {
    me.inside.store(true);
    if (open.load() == number) return;
    me.inside.store(false);
    throw Over{};
}

void Crew::help(Helper& me) {
    for (uint32_t seen = 0;; ) {
        const uint32_t number = work.load();
        if (number == seen) {
            sleep_while(work, seen);
            continue;
        }
        my_work = seen = number;
        if (&me - helpers >= wanted.load()) continue;
        try {
            enter(me, number);
            my_loop = first.load();
            fesetenv(&rounding);
            f(given);
            me.inside.store(false);
        } catch (const Over&) {
        }
    }
}

// Shortly before a tick: wait until it is over, with nothing that others wait for.
void Crew::safe_point() {
    const int64_t time = now(), period = tick(), left = period - time % period;
    if (took_at) {
        const int64_t lasted = time - took_at;
        if (lasted < MOST_NS) margin = std::max(LEAST_NS, std::max(2 * lasted, margin - margin / 64));
    }
    if (left < margin) {
        if (my_helper) my_helper->inside.store(false);
        while (now() < time + left + LATE_NS) {}
        if (my_helper) enter(*my_helper, my_work);
    }
    took_at = 0;
}

// Wait until others have finished loop `mine`.
void Crew::wait(uint64_t mine) {
    if (!over(mine)) {
        if (my_helper) my_helper->inside.store(false);
        const int64_t since = now();
        for (int i = 1; !over(mine); i++) {
            if (i % 16 || now() - since < SPIN_NS) {
                rest();
                continue;
            }
            sleepers++;
            if (!over(mine)) sleep_while(loop, uint32_t(mine));
            sleepers--;
        }
        if (my_helper) enter(*my_helper, my_work);
    }
    took_at = 0;
}

// Loop `mine` is finished.
void Crew::after(uint64_t mine) {
    const uint64_t next = (mine + 1) % LOOPS;
    done.store(0);
    loop.store(uint32_t(next));
    state.store(next << 24);
    if (sleepers.load()) wake_all(loop);
}

bool Crew::take(int64_t takings, int64_t& found) {
    for (;;) {
        uint64_t at = state.load();
        if (at >> 24 != my_loop) return false;
        found = int64_t(at & 0xffffff);
        if (found >= takings) return wait(my_loop), false;
        safe_point();
        if (!state.compare_exchange_strong(at, at + 1)) continue;
        took_at = now();
        return true;
    }
}

void Crew::finish(int64_t takings) {
    if (done.fetch_add(1) + 1 == takings) after(my_loop);
}

Takings::Takings(int64_t count, int64_t work)
    : count(count), each(std::max<int64_t>(std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, work)), count / MOST_TAKINGS + 1)) {}

bool Takings::next(int64_t& from, int64_t& to) {
    const int64_t takings = std::max<int64_t>(1, (count + each - 1) / each);
    if (taken++) my_crew->finish(takings);
    int64_t found;
    if (my_crew->take(takings, found)) {
        from = found * each, to = std::min(count, from + each);
        return true;
    }
    my_loop = (my_loop + 1) % LOOPS;
    return false;
}

bool in_crew() { return my_crew != nullptr; }

// Threads that are bound to cores stay a team: a helper would be bound to the core of the thread that starts it. What f throws ends the process,
// as in a team: helpers may be in f.
bool crew_runs(void (*f)(void*), void* given) noexcept {
    const int threads = omp_get_max_threads();
    if (threads < 2 || my_crew || omp_in_parallel() || omp_get_proc_bind() != omp_proc_bind_false) return false;
    Crew* const crew = the_crew();
    if (crew->taken.test_and_set()) return false;
    crew->wanted.store(std::min(threads - 1, MOST_HELPERS));
    while (crew->count.load() < crew->wanted.load() && start_helper(crew)) {}
    my_crew = crew, took_at = 0;
    crew->begin(f, given);
    f(given);
    crew->end();
    works++;
    my_crew = nullptr;
    crew->taken.clear();
    return true;
}
#else
namespace {
const int64_t works = 0;
}
bool crowded() { return false; }
bool in_crew() { return false; }
bool crew_runs(void (*)(void*), void*) noexcept { return false; }
Takings::Takings(int64_t count, int64_t) : count(count), each(count) {}
bool Takings::next(int64_t&, int64_t&) { return false; }
#endif

// How often this process's crew has done a work.
extern "C" int64_t crew_works() { return works; }
