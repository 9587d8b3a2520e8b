//! The pool as jobs see it.

use super::*;

fn pool(threads: usize) -> Pool {
    Pool::with(threads, Spin::default(), Arc::new(Cores::new(threads)))
}

#[test]
fn every_item_is_done_once() {
    let mut pool = pool(3);
    for items in [0, 1, 2, 3, 7, 100, 1000] {
        let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
        for round in 0..200 {
            if round % 100 == 99 {
                std::thread::sleep(Duration::from_millis(2)); // let them park
            }
            pool.each(items, &|member, item| {
                assert!(member < 3);
                counts[item].fetch_add(1, Ordering::Relaxed);
            });
        }
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 200), "{items}");
    }
}

#[test]
fn nobody_waits_for_a_member_that_has_not_begun() {
    let mut pool = pool(2);
    let block = AtomicBool::new(true);
    let helped = AtomicUsize::new(0);
    // A worker that never gets a turn: its items are done by the caller.
    pool.state.cores.begin();
    pool.state.cores.begin();
    pool.each(64, &|member, _| {
        helped.fetch_add(member, Ordering::Relaxed);
    });
    assert_eq!(helped.load(Ordering::Relaxed), 0, "a member worked beyond its share");
    pool.state.cores.end();
    pool.state.cores.end();
    // One that has begun an item is waited for.
    let done = AtomicUsize::new(0);
    pool.last_wake = Instant::now() - WAKE_EVERY;
    pool.each(2, &|member, _| {
        if member == 0 {
            let start = Instant::now();
            while block.load(Ordering::SeqCst) && start.elapsed() < Duration::from_secs(10) {
                std::thread::yield_now();
            }
        } else {
            block.store(false, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(5));
        }
        done.fetch_add(1, Ordering::SeqCst);
    });
    assert_eq!(done.into_inner(), 2);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let mut pool = pool(2);
    for who in 0..8 {
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.each(8, &|_, item| assert!(item != who, "item {item} fails"));
        }));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.each(8, &|_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 8);
    }
}

/// Measured with the threads' own clocks, so that a loaded machine changes nothing.
#[test]
fn busy_counts_work_and_not_waiting() {
    let mut pool = Pool::with(2, Spin::up_to(Duration::from_secs(1)), Arc::new(Cores::new(2)));
    let now = || cpu_time(ClockId::CLOCK_THREAD_CPUTIME_ID);
    let before = pool.busy();
    let start = now();
    pool.begin_step();
    // The worker spins while the caller works.
    while now() - start < Duration::from_millis(20) {
        std::hint::spin_loop();
    }
    pool.end_step();
    pool.each(2, &|_, _| {}); // ends the worker's spinning, which is counted at its end
    std::thread::sleep(Duration::from_millis(5));
    let busy = pool.busy() - before;
    assert!(busy >= Duration::from_millis(20), "{busy:?}");
    // It spun as long, unless it was descheduled and parked.
    assert!(busy < Duration::from_millis(36), "{busy:?}");
}

#[test]
fn busy_counts_the_work_of_helpers() {
    let mut pool = pool(2);
    let worked = AtomicU64::new(0);
    pool.begin_step();
    pool.each(200, &|_, _| {
        let start = cpu_time(ClockId::CLOCK_THREAD_CPUTIME_ID);
        while cpu_time(ClockId::CLOCK_THREAD_CPUTIME_ID) - start < Duration::from_micros(100) {}
        worked.fetch_add(100_000, Ordering::Relaxed);
    });
    pool.end_step();
    assert!(pool.busy() >= Duration::from_nanos(worked.into_inner()));
}

/// A step that panicked is never ended by its caller; other stages must not share with it for ever.
#[test]
fn steps_are_counted_once() {
    let mut pool = pool(2);
    let cores = Arc::clone(&pool.state.cores);
    pool.begin_step();
    pool.begin_step();
    cores.begin();
    assert_eq!(cores.share(), 1);
    pool.end_step();
    pool.end_step();
    assert_eq!(cores.share(), usize::MAX);
    cores.begin();
    pool.begin_step();
    assert_eq!(cores.share(), 1);
    drop(pool);
    assert_eq!(cores.share(), 1, "two others are still at work");
    cores.end();
    assert_eq!(cores.share(), usize::MAX);
}

#[test]
fn a_crowded_host_does_not_spin() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let spins = |pool: &Pool| format!("{:?}", pool.state.spin).contains("limit: 50");
    assert!(spins(&Pool::new(1, cores)));
    assert!(!spins(&Pool::new(1, cores + 1)));
    assert!(!spins(&Pool::new(cores + 1, 1)));
}
