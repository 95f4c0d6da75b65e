// What test_crew.py asks of a crew without kernels. The machine is crowded.

#include "crew.cpp"

#include <cfenv>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <set>

bool crowded() { return true; }

// How many threads have had an index of a loop that lasts so many milliseconds, at one a millisecond.
static int threads_of(int milliseconds) {
    std::mutex mutex;
    std::set<pthread_t> seen;
    as_team(true, [&] {
        share(milliseconds, WHOLE_TAKING, [&](int64_t) {
            const timespec time{0, 1000000};
            nanosleep(&time, nullptr);
            std::lock_guard<std::mutex> lock(mutex);
            seen.insert(pthread_self());
        });
    });
    return int(seen.size());
}

int main(int, char** asked) {
    omp_set_num_threads(4);
    if (!std::strcmp(asked[1], "numbers end")) {
        // of loops and of works: both begin again in the middle of what follows
        the_crew()->state.store(((uint64_t(1) << 40) - 5) << 24), the_crew()->loop.store(uint32_t(-5)), the_crew()->work.store(uint32_t(-3));
        int64_t sum[2000] = {};
        for (int work = 0; work < 10; work++)
            as_team(true, [&] {
                for (int loop = 0; loop < 3; loop++) share(2000, 1000, [&](int64_t i) { sum[i] += 1; });
            });
        int wrong = 0;
        for (const int64_t s : sum) wrong += s != 30;
        std::printf("%d %d\n", wrong, int(crew_works()));
    } else if (!std::strcmp(asked[1], "fewer threads")) {
        const int before = threads_of(200);
        omp_set_num_threads(2);
        std::printf("%d %d\n", before, threads_of(200));
    } else if (!std::strcmp(asked[1], "another rounding")) {
        threads_of(20);
        std::fesetround(FE_DOWNWARD);
        const volatile float one = 1, three = 3;
        const float down = one / three;
        std::atomic<int> other{0};
        for (int work = 0; work < 20; work++)
            as_team(true, [&] {
                share(20, WHOLE_TAKING, [&](int64_t) {
                    const timespec time{0, 100000};
                    nanosleep(&time, nullptr);
                    other += one / three != down;
                });
            });
        std::printf("%d\n", other.load());
    } else if (!std::strcmp(asked[1], "bound threads")) {
        threads_of(20);
        std::printf("%d\n", int(crew_works()));
    } else {
        try {
            const pthread_t caller = pthread_self();
            as_team(true, [=] {
                if (pthread_self() == caller) throw std::bad_alloc();
            });
        } catch (const std::bad_alloc&) {
            std::printf("goes on\n");
        }
    }
}
