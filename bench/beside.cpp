// What Linux gives two threads that share small pieces of work beside processes that never rest: their work over that of two such processes.
//
//     g++ -O2 -pthread -o beside bench/beside.cpp
//     ./beside NEIGHBOURS halves|taking|tick|one SECONDS
//
// The work is a row of phases of 16 pieces of 4 microseconds; none begins before the one before is done. halves: each thread does 8 pieces of
// each. taking: whoever is free takes the next. tick: as taking, and none begins a piece within 8 microseconds before the kernel's tick, at
// which Linux takes cores away. one: a thread alone. Threads ask for turns of 0.1 ms, and sleep after 30 microseconds of waiting.

#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

const int PIECES = 16;
const double PIECE_US = 4, SPIN_US = 30, BEFORE_TICK_US = 8, AFTER_TICK_US = 6;

double us(clockid_t clock = CLOCK_MONOTONIC) {
    timespec t;
    clock_gettime(clock, &t);
    return double(t.tv_sec) * 1e6 + double(t.tv_nsec) * 1e-3;
}

int turns_of_the_loop;
volatile double sink;
void piece() {
    double x = 1;
    for (int i = 0; i < turns_of_the_loop; i++) x = x * 1.0000001 + 1e-9;
    sink = x;
}

// state: phase << 32 | pieces that are taken
alignas(64) std::atomic<uint64_t> state{0};
alignas(64) std::atomic<int> done{0};
alignas(64) std::atomic<uint32_t> phase{0};
std::atomic<int> sleepers{0};
std::atomic<bool> stop{false};

long futex(int what, uint32_t value) { return syscall(SYS_futex, &phase, what | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0); }

void finish(uint64_t number, int of) {
    if (done.fetch_add(1) + 1 < of) return;
    done = 0;
    state = (number + 1) << 32, phase = uint32_t(number + 1);
    if (sleepers) futex(FUTEX_WAKE, 100);
}

void wait(uint64_t number) {
    const double since = us();
    while (phase == uint32_t(number) && !stop) {
        if (us() - since < SPIN_US) continue;
        sleepers++;
        if (!stop) futex(FUTEX_WAIT, uint32_t(number));
        sleepers--;
    }
}

void pass_the_tick() {
    static const double period = [] {
        timespec t;
        clock_getres(CLOCK_MONOTONIC_COARSE, &t);
        return double(t.tv_nsec) * 1e-3;
    }();
    const double now = us(), left = period - (now - period * uint64_t(now / period));
    if (left < BEFORE_TICK_US)
        while (us() < now + left + AFTER_TICK_US) {}
}

void ask_for_short_turns() {
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } asked{};
    syscall(SYS_sched_getattr, 0, &asked, sizeof(asked), 0);
    asked.size = sizeof(asked), asked.runtime = 100000;
    syscall(SYS_sched_setattr, 0, &asked, 0);
}

void run(std::string how) {
    ask_for_short_turns();
    for (uint64_t mine = 0; !stop;) {
        if (how == "halves") {
            for (int i = 0; i < PIECES / 2; i++) piece();
            finish(mine, 2);
            wait(mine++);
            continue;
        }
        uint64_t at = state;
        if (uint32_t(at) >= PIECES) {
            wait(at >> 32);
            continue;
        }
        if (how == "tick") pass_the_tick();
        if (!state.compare_exchange_strong(at, at + 1)) continue;
        piece();
        finish(at >> 32, PIECES);
    }
}

int main(int count, char** given) {
    if (count != 4) return std::fprintf(stderr, "usage: beside NEIGHBOURS halves|taking|tick|one SECONDS\n"), 2;
    const int neighbours = std::atoi(given[1]);
    const std::string how = given[2];
    turns_of_the_loop = 1000;
    double least = 1e9;
    for (int i = 0; i < 2000; i++) {
        const double began = us(CLOCK_THREAD_CPUTIME_ID);
        for (int j = 0; j < 20; j++) piece();
        least = std::min(least, (us(CLOCK_THREAD_CPUTIME_ID) - began) / 20);
    }
    turns_of_the_loop = int(1000 * PIECE_US / least);
    std::vector<pid_t> busy;
    for (int i = 0; i < neighbours; i++) {
        const pid_t made = fork();
        if (made == 0)
            for (;;) sink = 0;
        busy.push_back(made);
    }
    const auto spent = [&] {
        double sum = 0;
        for (pid_t process : busy) sum += us(clockid_t(~unsigned(process) << 3 | 2));
        return sum;
    };
    usleep(300000);
    const double before = spent(), began = us();
    std::vector<std::thread> team;
    for (int i = 0; i < (how == "one" ? 1 : 2); i++) team.emplace_back(run, how);
    usleep(useconds_t(1e6 * std::atof(given[3])));
    const double work = double(state >> 32) * PIECES * PIECE_US, wall = us() - began, theirs = spent() - before;
    stop = true;
    for (auto& thread : team) {
        phase++, futex(FUTEX_WAKE, 100);
        thread.join();
    }
    for (pid_t process : busy) kill(process, SIGKILL), waitpid(process, nullptr, 0);
    std::printf("%d neighbours, %s: work of %.3f cores", neighbours, how.c_str(), work / wall);
    if (neighbours) std::printf(", %.2f of what two neighbours have", work / (2 * theirs / neighbours));
    std::printf("\n");
}
