// pthread_create that has room for one thread more once `fill` was called, for LD_PRELOAD.
#include <cerrno>
#include <dlfcn.h>
#include <pthread.h>
static volatile int left = 1 << 30;
extern "C" void fill() { left = 1; }  // room for one more: the one that would park
extern "C" int pthread_create(pthread_t* t, const pthread_attr_t* a, void* (*f)(void*), void* x) {
    if (left-- <= 0) return EAGAIN;
    return ((int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*))dlsym(RTLD_NEXT, "pthread_create"))(t, a, f, x);
}
