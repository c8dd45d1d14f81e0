use std::time::Duration;

use super::*;

#[test]
fn return_times_count_from_the_drop_and_attempts_are_averaged() {
    let (recorder, t0) = connected(100);

    recorder.begin_phase(after(t0, 10.0), Counters::default());
    for index in 0..100 {
        recorder.due(index, after(t0, 10.0), true);
    }
    for index in 0..100 {
        recorder.handle(index, Event::Attempt, after(t0, 10.5));
        recorder.handle(index, Event::Refused(Some(Code::Overloaded)), after(t0, 10.5));
        recorder.handle(index, Event::Attempt, after(t0, 11.0));
        let back = if index == 99 { 20.0 } else { 11.0 };
        recorder.handle(index, Event::Connected, after(t0, back));
    }
    let (phases, seconds) = recorder.finish(after(t0, 30.0), Counters::default());

    assert_eq!(phases[1].t99_seconds, Some(1.0));
    assert_eq!(phases[1].t100_seconds, Some(10.0));
    assert_eq!(phases[1].attempts_per_device, Some(2.0));
    assert_eq!(phases[1].lost_sessions, 0);
    let all = &phases[1].groups["all"];
    assert_eq!(
        (all.connected, all.refused["overloaded"], all.latency.count),
        (100, 100, 100)
    );
    assert_eq!(seconds[10].refused, 100);
}

#[test]
fn devices_that_never_return_count_with_the_time_they_waited() {
    let (recorder, t0) = connected(2);

    recorder.begin_phase(after(t0, 1.0), Counters::default());
    recorder.due(0, after(t0, 1.0), true);
    recorder.due(1, after(t0, 1.0), true);
    recorder.handle(1, Event::Connected, after(t0, 2.0));
    recorder.begin_phase(after(t0, 5.0), Counters::default());
    assert_eq!(
        recorder.standing(),
        Standing {
            connected: 1,
            missing: 1,
            ..Standing::default()
        }
    );
    let (phases, _) = recorder.finish(after(t0, 61.0), Counters::default());

    assert_eq!(phases[1].t100_seconds, None);
    assert_eq!((phases[1].missing, phases[2].missing), (1, 1));
    let max_ms = phases[1].groups["all"].latency.max_ms.unwrap();
    assert!((max_ms - 60_000.0).abs() < 100.0, "{max_ms}");
    assert_eq!(phases[2].groups["all"].latency.count, 0);
}

#[test]
fn blocked_devices_are_not_waited_for() {
    let (recorder, t0) = connected(2);

    recorder.begin_phase(after(t0, 1.0), Counters::default());
    recorder.due(0, after(t0, 1.0), true);
    recorder.handle(0, Event::Refused(Some(Code::FirmwareBlocked)), after(t0, 1.1));
    recorder.handle(1, Event::Closed(Some(4000)), after(t0, 1.2));

    assert_eq!(
        recorder.standing(),
        Standing {
            blocked: 2,
            ..Standing::default()
        }
    );
    let (phases, _) = recorder.finish(after(t0, 2.0), Counters::default());
    assert_eq!(
        (phases[1].wanted, phases[1].lost_sessions, phases[1].missing),
        (0, 0, 0)
    );
}

#[test]
fn a_session_that_ends_by_itself_is_lost() {
    let (recorder, t0) = connected(1);

    recorder.handle(0, Event::Closed(Some(1012)), after(t0, 1.0));
    recorder.handle(0, Event::Closed(None), after(t0, 1.0));

    assert_eq!(
        recorder.standing(),
        Standing {
            missing: 1,
            lost_sessions: 1,
            ..Standing::default()
        }
    );
}

#[test]
fn a_session_that_the_device_ends_or_its_twin_takes_is_not_lost() {
    let (recorder, t0) = connected(2);

    recorder.handle(0, Event::Left, after(t0, 1.0));
    recorder.handle(1, Event::Replaced, after(t0, 1.0));

    assert_eq!(
        recorder.standing(),
        Standing {
            missing: 1,
            ..Standing::default()
        }
    );
}

#[test]
fn devices_are_counted_in_the_group_of_their_version() {
    let groups = BTreeMap::from([("marked".to_owned(), vec!["b3".to_owned()])]);
    let t0 = Instant::now();
    let recorder = Recorder::new(&["b2", "b3"], &groups, t0);
    recorder.begin_phase(t0, Counters::default());

    assert!(recorder.is_in(1, "marked") && !recorder.is_in(0, "marked"));
    recorder.upgraded(0, "b3");
    recorder.handle(0, Event::Attempt, t0);
    let (phases, _) = recorder.finish(t0, Counters::default());

    assert_eq!(phases[0].groups["marked"].attempts, 1);
    assert_eq!(phases[0].groups["marked"].devices, 2);
    assert_eq!(phases[0].groups["all"].attempts, 1);
}

fn connected(count: usize) -> (Recorder, Instant) {
    let t0 = Instant::now();
    let recorder = Recorder::new(&vec!["b2"; count], &BTreeMap::new(), t0);
    recorder.begin_phase(t0, Counters::default());
    for index in 0..count {
        recorder.due(index, t0, true);
        recorder.handle(index, Event::Attempt, t0);
        recorder.handle(index, Event::Connected, t0);
    }
    (recorder, t0)
}

fn after(t0: Instant, seconds: f64) -> Instant {
    t0 + Duration::from_secs_f64(seconds)
}
