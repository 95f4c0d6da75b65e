// Whether other processes want our cores, and that OpenMP's threads then sleep where they wait for each other.
//
// They spin for some 50 microseconds before they sleep. On a quiet machine that is faster than sleeping at once. Where one of them has lost
// its core to another process, the others spin in vain at every barrier, and what they spin away is then missing for their work. So a thread
// of this file looks at how many threads of the machine are runnable. libgomp lets its threads, torch's too, sleep almost at once as long as
// a process has more of them than there are cores. So threads that never run are added as long as the cores are taken. And as long, the
// kernel is asked for short turns: a thread that wakes up has its turn soon, so those that wait for it at a barrier wait less. Its share of
// the cores stays the same. No result depends on any of it: who computes what stays the same.
//
// Sleeping at once costs a quarter of the speed where nobody wants the cores. So it takes a second of others to begin with it, longer than a
// browser draws a page or a program starts, and a third of a second without them to end it.

#ifdef __linux__
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "crew.h"

namespace {

const int TO_ENTER = 128, TO_LEAVE = 32;       // looks
const long WORKING_MS = 10, RESTING_MS = 50;  // between two looks; the second where this process computes little
const double WORKING = 0.05;                   // cores
const double ENTER = 0.6, LEAVE = 0.3;         // runnable threads beyond the cores that there are

const uint64_t TURN_NS = 100000;  // the shortest that Linux gives
const int LISTS = 8;              // of this process's threads, read at most

// Not freed: threads may still wait here when the process ends.
struct Parking {
    std::mutex mutex;
    std::condition_variable over;
    bool crowded = false;
    int64_t times = 0;  // that the cores were taken
};
Parking* const parking = new Parking;
std::atomic<bool> taken{false};  // as parking->crowded, for who asks often

struct Watched {
    char loads[256];
    int64_t threads;
};

double seconds(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// given: the function deletes it. The thread, and those that it starts, leave all signals to others.
template <class Given> void start(void* (*function)(void*), Given* given) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    if (pthread_create(&thread, nullptr, function, given) == 0)
        pthread_detach(thread);
    else
        delete given;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// Runnable threads of the machine without the calling one; below 0: not known.
double runnable(const char* path) {
    char text[128] = {};
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    const ssize_t size = read(file, text, sizeof(text) - 1);
    close(file);
    long found = 0;
    return size > 0 && std::sscanf(text, "%*f %*f %*f %ld/", &found) == 1 ? double(std::max(0L, found - 1)) : -1;
}

void* pass(void* gate) {
    std::lock_guard<std::mutex> lock(*(std::mutex*)gate);
    return nullptr;
}

// Whether the system lets this process have so many threads more. libgomp ends a process that cannot have those it asks for.
bool room_for(int threads) {
    std::mutex gate;
    std::vector<pthread_t> made;
    {
        std::lock_guard<std::mutex> lock(gate);  // so that all are there at the same time
        for (pthread_t thread; threads > int(made.size()) && pthread_create(&thread, nullptr, pass, &gate) == 0;) made.push_back(thread);
    }
    for (const pthread_t thread : made) pthread_join(thread, nullptr);
    return threads == int(made.size());
}

struct Parked {
    int threads;
    int64_t time;
};

void* park(void* given) {
    const int threads = ((Parked*)given)->threads;
    const int64_t time = ((Parked*)given)->time;
    delete (Parked*)given;
    if (!room_for(threads)) return nullptr;
#pragma omp parallel num_threads(threads)
    {
        std::unique_lock<std::mutex> lock(parking->mutex);
        parking->over.wait(lock, [&] { return !parking->crowded || parking->times != time; });
    }
    return nullptr;  // its team ends with it
}

// sched_setattr(2), which older C libraries do not have.
struct Attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

// Whether asking is safe. A filter of system calls may end who asks, as systemd's SystemCallFilter=~@resources does: where there is one, a
// child asks first. It is made without the C library, whose handlers of forks stop other libraries' threads, and does nothing else.
bool may_ask() {
    if (prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 0) return true;
    const long child = syscall(SYS_clone, 0, 0, 0, 0, 0);
    if (child == 0) {
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);  // no core file
        Attributes a{};
        if (syscall(SYS_sched_getattr, 0, &a, sizeof(a), 0) == 0) a.size = sizeof(a), syscall(SYS_sched_setattr, 0, &a, 0);
        for (;;) syscall(SYS_exit_group, 0);
    }
    int status = 0;
    pid_t found;
    do found = child > 0 ? waitpid(pid_t(child), &status, __WALL) : -1;
    while (found < 0 && child > 0 && errno == EINTR);
    return found == child && status == 0;
}

// Ask for turns of so many nanoseconds for every thread of this process that is listed and has others; 0: for turns as long as the kernel likes,
// where they are ours. Whether there was one.
bool ask_those_listed(uint64_t nanoseconds) {
    DIR* const threads = opendir("/proc/self/task");
    if (threads == nullptr) return false;
    bool any = false;
    while (const dirent* const entry = readdir(threads)) {
        const long id = std::atol(entry->d_name);
        Attributes a{};
        if (id <= 0 || syscall(SYS_sched_getattr, id, &a, sizeof(a), 0) != 0) continue;
        if ((a.policy != SCHED_OTHER && a.policy != SCHED_BATCH) || (a.runtime == TURN_NS) == (nanoseconds == TURN_NS)) continue;
        a.size = sizeof(a), a.runtime = nanoseconds;
        any |= syscall(SYS_sched_setattr, id, &a, 0) == 0;
    }
    closedir(threads);
    return any;
}

// For every thread. Those that they start have the same. A list ends early where one of its threads ends while it is read, so it is read until
// it holds nobody to ask. Linux before 6.12 does not listen.
void ask_for_turns(uint64_t nanoseconds) {
    for (int i = 0; i < LISTS && ask_those_listed(nanoseconds);) i++;
}

void set_crowded(bool crowded, int threads, bool asks) {
    std::lock_guard<std::mutex> lock(parking->mutex);
    if (parking->crowded == crowded) return;
    taken = parking->crowded = crowded;
    if (asks) ask_for_turns(crowded ? TURN_NS : 0);
    if (!crowded) return parking->over.notify_all();
    start(park, new Parked{threads, ++parking->times});
}

void* watch(void* given) {
    const Watched watched = *(Watched*)given;
    delete (Watched*)given;
    double wanted[TO_ENTER], wall[TO_ENTER], cpu[TO_ENTER];
    bool crowded = false, told = false;
    const bool asks = may_ask();  // at the beginning, when this process is still small
    long pause = WORKING_MS;
    for (int64_t i = 0;; i++) {
        const timespec nap{0, pause * 1000000};
        nanosleep(&nap, nullptr);
        const int at = int(i % TO_ENTER);
        wanted[at] = runnable(watched.loads), wall[at] = seconds(CLOCK_MONOTONIC), cpu[at] = seconds(CLOCK_PROCESS_CPUTIME_ID);
        if (wanted[at] < 0) {  // no file can be opened just now, say: nothing is known until there are enough looks again
            if (!told) return nullptr;
            set_crowded(crowded = false, 0, asks);
            i = -1, pause = RESTING_MS;
            continue;
        }
        told = true;
        if (i + 1 < TO_ENTER) continue;
        cpu_set_t set;
        const double all = double(sysconf(_SC_NPROCESSORS_ONLN));
        const double cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? double(CPU_COUNT(&set)) : all;
        const int64_t first = i + 1 - (crowded ? TO_LEAVE : TO_ENTER);
        double sum = 0;  // each look stands for the time since the one before: a process that begins to compute looks more often
        for (int64_t k = first + 1; k <= i; k++) sum += wanted[k % TO_ENTER] * (wall[k % TO_ENTER] - wall[(k - 1) % TO_ENTER]);
        const double time = wall[at] - wall[first % TO_ENTER], used = (cpu[at] - cpu[first % TO_ENTER]) / time;
        // others run on cores that are not ours first, where there are some
        const double others = std::max(0.0, sum / time - used - std::max(0.0, all - cores));
        const bool before = crowded;
        crowded = others + double(watched.threads) - cores > (crowded ? LEAVE : ENTER);
        if (before && !crowded) i = -1;  // what was seen of the others is over, and enters nothing again
        // one thread of those that park is there already, and the others make them more than the cores
        set_crowded(crowded, std::max(2, int(int64_t(cores) - watched.threads) + 2), asks);
        pause = used < WORKING ? RESTING_MS : WORKING_MS;
    }
}

}  // namespace

bool crowded() { return taken; }

extern "C" {

// Look at `loads` (/proc/loadavg) from now on, for a process that computes on so many threads. Once in a process. A fork does not look: one of
// a process whose OpenMP threads have run cannot use them anyway.
void crowd_watch(const char* loads, int64_t threads) {
    static std::atomic<bool> looks{false};
    if (looks.exchange(true)) return;
    auto* given = new Watched{{}, threads};
    std::strncpy(given->loads, loads, sizeof(given->loads) - 1);
    start(watch, given);
}

// Whether OpenMP's threads sleep where they wait.
int64_t crowd_seen() {
    std::lock_guard<std::mutex> lock(parking->mutex);
    return parking->crowded;
}
}
#endif
