//! Compares the simulator with known results: queueing theory, conservation, monotonicity, and measurements.

use super::times::{Concepts, Decode, Engine, Origin, Size, Training};
use super::*;

/// One image at a time, `seconds` each, with an unbounded queue.
fn server(seconds: f64) -> Times {
    let codes = 1000;
    Times {
        name: "a server of queueing theory".to_owned(),
        origin: Origin::Estimate,
        notes: vec![],
        engine: Engine {
            rows: 1,
            rows_per_picture: 1,
            queue: 1_000_000,
            training_share: 0.5,
            picture_threads: 1,
            restart_seconds: 10.0,
        },
        decode: Decode {
            rows: vec![1.0],
            step_ms: vec![1e3 * seconds / f64::from(codes)],
            context_tokens: 0.0,
            row_token_us: 0.0,
        },
        sizes: vec![Size {
            name: "one".to_owned(),
            weight: 1.0,
            codes,
            row_ends: 0,
            prompt_tokens: 0,
            prefill_ms: 0.0,
            pixels_ms: 0.0,
            pixels_device_ms: 0.0,
            file_bytes: 1,
        }],
        concepts: Concepts {
            file_bytes: 1,
            device_bytes: 1 << 20,
            memory_mib: 8.0,
            fetch_ms: 0.0,
            upload_ms: 0.0,
        },
        training: Training {
            steps: 100,
            step_ms: 100.0,
            start_seconds: 0.0,
            slots: 1,
            checkpoint_seconds: 5.0,
            checkpoint_bytes: 1,
            beside: 1.0,
        },
    }
}

fn load(pictures_per_second: f64, seconds: f64) -> Workload {
    Workload {
        pictures_per_second,
        seconds,
        warm_up: 0.05 * seconds,
        concept_share: 0.0,
        ..Workload::default()
    }
}

fn workers(workers: usize, policy: Policy) -> Fleet {
    Fleet {
        workers,
        policy,
        ..Fleet::default()
    }
}

fn near(is: f64, expected: f64, within: f64) {
    assert!((is / expected - 1.0).abs() < within, "{is} for {expected}");
}

#[test]
fn single_server_matches_pollaczek_khinchine() {
    let fleet = workers(1, Policy::LeastLoaded);
    for rho in [0.5, 0.8] {
        let mut workload = load(rho, 400_000.0);
        // M/D/1: the mean wait is rho / (2 (1 - rho)) of a service.
        let fixed = simulate(&server(1.0), &workload, &fleet, 1).unwrap();
        near(fixed.latency.mean - 1.0, rho / (2.0 * (1.0 - rho)), 0.04);
        // M/M/1: twice that; the time in the system is exponential with mean 1 / (1 - rho).
        workload.geometric = true;
        let random = simulate(&server(1.0), &workload, &fleet, 2).unwrap();
        near(random.latency.mean, 1.0 / (1.0 - rho), 0.05);
        near(random.latency.p95, 20f64.ln() / (1.0 - rho), 0.06);
        near(random.utilisation, rho, 0.01);
    }
}

#[test]
fn little_holds() {
    let times = Times::read("30m").unwrap();
    for rate in [0.5, 1.5] {
        let seen = simulate(&times, &load(rate, 40_000.0), &workers(1, Policy::LeastLoaded), 3).unwrap();
        near(seen.in_system, seen.done_per_second * seen.latency.mean, 0.01);
    }
}

#[test]
fn random_routing_equals_independent_servers_and_choosing_is_better() {
    let workload = load(3.2, 150_000.0);
    let seen = |policy| simulate(&server(1.0), &workload, &workers(4, policy), 4).unwrap();
    let random = seen(Policy::Random);
    near(random.latency.mean - 1.0, 0.8 / (2.0 * 0.2), 0.05);
    assert!(seen(Policy::LeastLoaded).latency.mean - 1.0 < 0.5 * (random.latency.mean - 1.0));
}

#[test]
fn no_request_is_lost_when_workers_die() {
    let mut times = Times::read("30m").unwrap();
    times.engine.queue = 8;
    times.training.steps = 50;
    let workload = Workload {
        pictures_per_second: 9.0,
        trainings_per_hour: 20.0,
        arrivals: Arrivals::Bursty {
            factor: 4.0,
            seconds: 20.0,
        },
        seconds: 4000.0,
        warm_up: 100.0,
        ..Workload::default()
    };
    let fleet = Fleet {
        training_workers: 0,
        workers: 3,
        policy: Policy::Server,
        hop_ms: 20.0,
        failures: Some(Failures {
            mtbf_hours: 0.1,
            lease_seconds: (10.0, 45.0),
        }),
    };
    let seen = simulate(&times, &workload, &fleet, 5).unwrap();
    assert!(
        seen.deaths > 10 && seen.interrupted > 50 && seen.refused > 0.01,
        "{seen:?}"
    );
    assert_eq!(seen.asked, seen.done + seen.refused_pictures);
    assert_eq!(seen.in_system_at_end, seen.done_later);
    assert!(seen.in_system_at_end > 0);
    assert_eq!(seen, simulate(&times, &workload, &fleet, 5).unwrap());
    assert_ne!(seen, simulate(&times, &workload, &fleet, 6).unwrap());
}

#[test]
fn worker_death_costs_one_lease() {
    let times = server(1.0);
    let mut fleet = workers(4, Policy::LeastLoaded);
    let calm = simulate(&times, &load(1.0, 40_000.0), &fleet, 7).unwrap();
    fleet.failures = Some(Failures {
        mtbf_hours: 0.5,
        lease_seconds: (30.0, 30.0),
    });
    let stormy = simulate(&times, &load(1.0, 40_000.0), &fleet, 7).unwrap();
    assert!(calm.latency.largest < 10.0 && stormy.latency.largest > 30.0);
    assert!(stormy.latency.largest < 45.0, "{:?}", stormy.latency);
    near(stormy.latency.p95, calm.latency.p95, 0.2);
}

#[test]
fn more_workers_are_never_worse() {
    let times = Times::read("7b-h100").unwrap();
    let workload = load(4.0, 3000.0);
    let seen: Vec<Report> = (1..=5)
        .map(|count| simulate(&times, &workload, &workers(count, Policy::LeastLoaded), 8).unwrap())
        .collect();
    for pair in seen.windows(2) {
        assert!(pair[1].latency.p95 <= pair[0].latency.p95 && pair[1].refused <= pair[0].refused);
        assert!(pair[1].utilisation <= pair[0].utilisation + 1e-9);
    }
    assert!(seen[0].refused > 0.1 && seen[4].refused == 0.0, "{}", seen[0].refused);
}

#[test]
fn plan_is_minimal() {
    let times = Times::read("7b-h100").unwrap();
    let workload = Workload {
        pictures_per_second: 5.0,
        ..Workload::default()
    };
    let goal = Goal {
        p95: 20.0,
        refused: 0.001,
        training_wait: 600.0,
    };
    let planned = plan(&times, &workload, &Fleet::default(), &goal, 9).unwrap();
    let enough = planned.workers.unwrap();
    assert!(enough >= planned.at_least && planned.report.latency.p95 <= 20.0);
    let one = Goal { p95: 1.0, ..goal };
    assert_eq!(
        plan(&times, &workload, &Fleet::default(), &one, 9).unwrap().workers,
        None
    );
}

#[test]
fn trainings_get_their_share_under_load() {
    let mut times = server(0.4);
    times.training.steps = 1_000_000;
    // Longer slices get more than their share: the engine's policy halves the accumulated lag every two seconds.
    times.training.step_ms = 31.0;
    let workload = Workload {
        trainings_at_start: 1,
        ..load(5.0, 20_000.0)
    };
    // Twice as many images as the device can generate: it is always busy.
    for share in [0.25, 0.5] {
        times.engine.training_share = share;
        times.engine.queue = 10;
        let seen = simulate(&times, &workload, &Fleet::default(), 10).unwrap();
        assert!((seen.training - share).abs() < 0.03, "{share}: {}", seen.training);
        near(seen.training + seen.drawing, 1.0, 1e-6);
    }
}

#[test]
fn dedicated_training_workers_do_not_affect_images() {
    let times = Times::read("7b-h100").unwrap();
    let workload = Workload {
        trainings_per_hour: 30.0,
        ..load(2.0, 20_000.0)
    };
    let mut fleet = workers(4, Policy::LeastLoaded);
    let mixed = simulate(&times, &workload, &fleet, 12).unwrap();
    fleet.training_workers = 2;
    let apart = simulate(&times, &workload, &fleet, 12).unwrap();
    // Two devices generate two images a second as if there were no training.
    let alone = simulate(&times, &load(2.0, 20_000.0), &workers(2, Policy::LeastLoaded), 12).unwrap();
    assert_eq!(apart.latency, alone.latency);
    assert!(
        apart.latency.p95 < mixed.latency.p95,
        "{:?} {:?}",
        apart.latency,
        mixed.latency
    );
    // Every training takes 157 s: 30 an hour keep 1.3 of four devices busy.
    near(apart.training, 30.0 / 3600.0 * 156.84 / 4.0, 0.1);
}

#[test]
fn warm_workers_are_preferred_without_extra_wait() {
    let mut times = Times::read("7b-h100").unwrap();
    times.concepts.memory_mib = 8.0;
    let workload = Workload {
        concept_share: 1.0,
        concepts: 1000,
        ..load(6.0, 3000.0)
    };
    let seen = |policy| simulate(&times, &workload, &workers(6, policy), 11).unwrap();
    let (warm, least) = (seen(Policy::Server), seen(Policy::LeastLoaded));
    assert!(
        warm.concept_hits > least.concept_hits + 0.1,
        "{} {}",
        warm.concept_hits,
        least.concept_hits
    );
    assert!(warm.latency.p95 < 1.25 * least.latency.p95);
}

/// docs/performance.md, `coar-lab bench serve` with 16 concurrent requests on a 30 M checkpoint: the file's step
/// times are from `coar-lab bench decode`, so this is a prediction.
#[test]
fn sixteen_concurrent_requests_match_the_measurement() {
    let at_once = |name: &str, training: u32| {
        let workload = Workload {
            arrivals: Arrivals::AtOnce { pictures: 16 },
            trainings_at_start: training,
            concept_share: 0.0,
            seconds: 60.0,
            warm_up: 0.0,
            ..Workload::default()
        };
        let mut times = Times::read(name).unwrap();
        times.training.steps = 20_000;
        simulate(&times, &workload, &Fleet::default(), 0).unwrap()
    };
    let seen = at_once("30m", 0);
    near(60.0 * seen.done_per_second, 127.3, 0.05);
    near(seen.latency.p50, 6.93, 0.05);
    near(seen.latency.p95, 7.40, 0.06);
    // The pocket model: throughput is the file's input; the latencies and the speed beside a training are
    // predictions.
    let seen = at_once("pocket", 0);
    near(60.0 * seen.done_per_second, 1395.0, 0.02);
    near(seen.latency.p50, 0.64, 0.05);
    near(seen.latency.p95, 0.74, 0.10);
    near(seen.first_code.p50, 0.067, 0.10);
    near(at_once("pocket", 1).done_per_second / seen.done_per_second, 0.451, 0.12);
}
