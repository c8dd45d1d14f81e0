use std::time::{Duration, Instant as Clock};

use seawall_proto::{cohorts::Outcome, rules::Effect};

use super::*;

fn shown(model: Option<&str>, firmware: Option<&str>, cohorts: &Cohorts) -> Option<Shown> {
    let breaker = CohortBreaker::new(Mode::Propose);
    let bad = cohorts.intern(model, firmware);
    (0..100).for_each(|_| bad.session_opened());
    let rest = cohorts.intern(Some("rest"), Some("1.0"));
    (0..1_000).for_each(|_| rest.session_opened());
    let tenant: Arc<str> = "acme".into();
    for second in 1..20_u64 {
        breaker.handle_second(cohorts, &[], 1.0, Instant::from_micros(second * 1_000_000));
        for device in 0..10 {
            let number = second * 10 + device;
            let [.., c, d] = number.to_be_bytes();
            let of = Of {
                device: DeviceId::from_uuid(Uuid::from_u128(number.into())),
                address: [192, c, d, 1].into(),
                cohort: &bad,
                tenant: Some(&tenant),
            };
            breaker.handle_event(EventKind::Repeat, &of, true, 1_100);
        }
    }
    breaker.proposals().into_iter().next()
}

#[test]
fn proposed_rule_is_for_that_cohort_alone_and_admits_a_tenth() {
    let cohorts = Cohorts::new();

    let shown = shown(Some("box"), Some("v3.8.0-b3"), &cohorts).unwrap();

    let rule = shown.rule(WallTime::from_unix_ms(5_000)).unwrap();
    assert_eq!(rule.matches.firmware.as_ref().unwrap().as_str(), "=v3.8.0-b3");
    assert_eq!(rule.matches.model.as_deref(), Some("box"));
    assert_eq!((rule.admit_percent, rule.effect), (10, Effect::Block));
    assert_eq!(rule.expires_at, Some(WallTime::from_unix_ms(905_000)));
    assert!(rule.validate().is_ok());
    assert_eq!(shown.tenant.as_deref(), Some("acme"));
    let matches = |model, firmware| {
        rule.is_for(&Subject {
            device: None,
            firmware,
            model,
            tenant: None,
        })
    };
    assert!(matches(Some("box"), Some("3.8.0-b3")));
    assert!(!matches(Some("box"), Some("3.8.0")) && !matches(None, Some("3.8.0-b3")));
}

#[test]
fn rule_for_a_cohort_without_a_model_is_exact_only_while_no_model_has_its_version() {
    let cohorts = Cohorts::new();
    let shown = shown(None, Some("2.0"), &cohorts).unwrap();
    let rule = shown.rule(WallTime::default()).unwrap();
    let breaker = CohortBreaker::new(Mode::Propose);
    breaker.handle_second(&cohorts, &[], 1.0, Instant::from_micros(1));
    assert!(breaker.is_exact(&rule, &shown.cohort));

    let _other = cohorts.intern(Some("box"), Some("2.0"));
    breaker.handle_second(&cohorts, &[], 1.0, Instant::from_micros(2));

    assert!(!breaker.is_exact(&rule, &shown.cohort));
}

/// The fastest of five batches: other programs of the machine may hold up some.
#[test]
fn counting_a_connect_takes_under_a_microsecond() {
    const CONNECTS: u32 = 20_000;
    let cohorts = Cohorts::new();
    let breaker = CohortBreaker::new(Mode::Propose);
    let cohort = cohorts.intern(Some("box"), Some("1.0"));

    let batches = (0..5).map(|_| {
        let begun = Clock::now();
        for number in 0..CONNECTS {
            let address = IpAddr::from(number.to_be_bytes());
            cohort.attempted(Outcome::Admitted);
            cohort.count(Figure::ConnectMicros, 300);
            cohort.looked_up(900, 7);
            breaker.handle_opened(address);
            breaker.handle_closed(address);
            cohort.count(Figure::SessionsEnded, 1);
            cohort.count(Figure::SessionMillis, 5);
        }
        begun.elapsed() / CONNECTS
    });

    let each = batches.min().unwrap();
    println!("{each:?} a connect");
    assert!(each < Duration::from_micros(1), "{each:?}");
}
