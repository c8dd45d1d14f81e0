use proptest::prelude::*;

use super::*;
use crate::id::SecretHash;

const SECRET: [u8; 32] = [1; 32];

fn keys() -> ResumeKeys {
    ResumeKeys::new(1, SECRET)
}

fn device(n: u128) -> DeviceId {
    DeviceId::from_uuid(uuid::Uuid::from_u128(n))
}

fn label(text: &str) -> Label {
    Label::parse(text).unwrap().unwrap()
}

fn credential() -> Credential {
    SecretHash::of(b"right").into()
}

/// A Monday.
fn start() -> WallTime {
    WallTime::from_unix_ms(1_767_225_600_000)
}

fn after(span: Duration) -> WallTime {
    start() + span
}

fn tenant() -> Label {
    label("acme")
}

fn grant() -> Grant {
    Grant {
        device: device(1),
        credential: credential(),
        tenant: tenant(),
        model: Some(label("camera 2")),
        generation: Generation(7),
        credential_until: None,
    }
}

fn none_revoked() -> Revoked {
    Revoked::of(Generation(7), Generation(0), [])
}

fn mint(grant: &Grant, wall: WallTime) -> Minted {
    grant.mint(&keys(), SessionId(9), LIFE, wall).unwrap()
}

struct Shown<'a> {
    keys: ResumeKeys,
    revoked: Revoked,
    is_stale: bool,
    device: DeviceId,
    credential: Credential,
    token: &'a str,
    wall: WallTime,
}

impl<'a> Shown<'a> {
    fn of(token: &'a str) -> Self {
        Self {
            keys: keys(),
            revoked: none_revoked(),
            is_stale: false,
            device: device(1),
            credential: credential(),
            token,
            wall: start(),
        }
    }

    fn verdict(&self) -> Result<Accepted, Rejected> {
        let verifier = Verifier {
            keys: &self.keys,
            revoked: &self.revoked,
            is_stale: self.is_stale,
        };
        verifier.verify(self.device, &self.credential, self.token, self.wall)
    }
}

#[test]
fn token_says_what_the_registry_said() {
    let token = mint(&grant(), start()).text;

    let counted = Shown::of(&token).verdict().unwrap();

    assert_eq!(
        counted,
        Accepted {
            grant: grant(),
            session: SessionId(9),
            is_graced: false
        }
    );
}

#[test]
fn longest_token_fits_its_header() {
    let name = label(&"m".repeat(Label::LEN_MAX));
    let longest = Grant {
        tenant: name.clone(),
        model: Some(name),
        ..grant()
    };

    let token = mint(&longest, start()).text;

    assert_eq!(token.len(), TOKEN_TEXT_LEN_MAX);
    assert_eq!(Shown::of(&token).verdict().unwrap().grant, longest);
}

#[test]
fn token_of_another_device_credential_root_or_form_does_not_count() {
    let token = mint(&grant(), start()).text;
    let shown = || Shown::of(&token);
    let long = token.repeat(100);

    let others = [
        Shown {
            device: device(2),
            ..shown()
        },
        Shown {
            credential: SecretHash::of(b"other").into(),
            ..shown()
        },
        Shown {
            keys: ResumeKeys::new(1, [2; 32]),
            ..shown()
        },
        Shown {
            keys: ResumeKeys::new(2, SECRET),
            ..shown()
        },
        Shown::of(""),
        Shown::of("="),
        Shown::of(&token[..token.len() - 1]),
        Shown::of(&token[..60]),
        Shown::of(&token[4..]),
        Shown::of(&long),
        Shown::of("\u{e9}\u{e9}\u{e9}\u{e9}"),
    ];

    for other in others {
        assert_eq!(other.verdict(), Err(Rejected::Invalid));
    }
}

#[test]
fn token_with_any_changed_character_does_not_count() {
    let token = mint(&grant(), start()).text;

    for at in 0..token.len() {
        let mut forged = token.as_bytes().to_vec();
        forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
        let forged = String::from_utf8(forged).unwrap();

        assert_eq!(Shown::of(&forged).verdict(), Err(Rejected::Invalid), "at {at}");
    }
}

#[test]
fn token_lives_a_day_and_eight_hours_more_only_while_the_database_is_away() {
    let token = mint(&grant(), start()).text;
    let verdict = |wall, is_stale| {
        let shown = Shown {
            wall,
            is_stale,
            ..Shown::of(&token)
        };
        shown.verdict().map(|accepted| accepted.is_graced)
    };
    let second = Duration::from_secs(1);

    assert_eq!(verdict(after(LIFE), false), Ok(false));
    assert_eq!(verdict(after(LIFE + SKEW), false), Ok(false));
    assert_eq!(
        verdict(after(LIFE + SKEW + second), false),
        Err(Rejected::Expired(tenant()))
    );
    assert_eq!(verdict(after(LIFE + SKEW + second), true), Ok(true));
    assert_eq!(verdict(after(LIFE + GRACE + SKEW), true), Ok(true));
    assert_eq!(
        verdict(after(LIFE + GRACE + SKEW + second), true),
        Err(Rejected::Expired(tenant()))
    );
}

#[test]
fn token_counts_after_the_clock_was_set_back_by_a_day_and_no_more() {
    let token = mint(&grant(), after(AHEAD_MAX)).text;
    let too_far = mint(&grant(), after(AHEAD_MAX + Duration::from_secs(1))).text;

    assert!(Shown::of(&token).verdict().is_ok());
    assert_eq!(Shown::of(&too_far).verdict(), Err(Rejected::Invalid));
}

#[test]
fn keys_change_by_themselves_and_refuse_no_token_that_lives() {
    let minute = Duration::from_mins(1);
    let oldest = LIFE + GRACE + SKEW;
    let mut roots = std::collections::BTreeSet::new();

    for minutes in (0..3 * 7 * 24 * 60).step_by(17) {
        let minted_at = after(minute * minutes);
        let token = mint(&grant(), minted_at).text;
        roots.insert(token[..4].to_owned());
        for age in [Duration::ZERO, LIFE, oldest] {
            let shown = Shown {
                wall: minted_at + age,
                is_stale: true,
                ..Shown::of(&token)
            };
            assert!(shown.verdict().is_ok(), "{minutes} {age:?}");
        }
        // A node whose clock is slow, or was set back.
        for ahead in [SKEW, Duration::from_hours(1), AHEAD_MAX] {
            let ahead = u64::try_from(ahead.as_millis()).unwrap();
            let behind = Shown {
                wall: WallTime::from_unix_ms(minted_at.as_unix_ms() - ahead),
                ..Shown::of(&token)
            };
            assert!(behind.verdict().is_ok(), "{minutes} {ahead}");
        }
    }

    assert!(roots.len() >= 3, "{roots:?}");
}

#[test]
fn a_new_root_accepts_tokens_of_the_one_before() {
    let token = mint(&grant(), start()).text;
    let rotated = ResumeKeys::new(2, [2; 32]).with_older(1, SECRET);
    let prepared = keys().with_older(2, [2; 32]);

    let newer = grant().mint(&rotated, SessionId(9), LIFE, start()).unwrap().text;

    let by = |keys: &ResumeKeys, token| {
        Shown {
            keys: keys.clone(),
            ..Shown::of(token)
        }
        .verdict()
        .is_ok()
    };
    assert!(by(&rotated, &token));
    assert!(by(&prepared, &newer), "a node that still signs with the previous root");
    assert!(!by(&keys(), &newer));
}

#[test]
fn token_of_a_credential_that_was_replaced_ends_with_it_without_grace() {
    let overlap = Duration::from_hours(2);
    let replaced = Grant {
        credential_until: Some(after(overlap)),
        ..grant()
    };

    let minted = mint(&replaced, start());

    assert_eq!(minted.renew_after, None);
    let at = |wall| Shown {
        wall,
        is_stale: true,
        ..Shown::of(&minted.text)
    };
    let just_before = at(after(overlap - Duration::from_secs(1))).verdict().unwrap();
    assert_eq!(just_before.grant, replaced, "and so do the tokens made from it");
    assert_eq!(at(after(overlap)).verdict(), Err(Rejected::Expired(tenant())));
    assert_eq!(replaced.mint(&keys(), SessionId(9), LIFE, after(overlap)), None);
}

#[test]
fn token_of_before_a_change_does_not_count_and_one_of_after_it_does() {
    let before = mint(&grant(), start()).text;
    let mut revoked = none_revoked();
    revoked.revoke(device(1), Generation(8));
    revoked.confirm(Generation(8));
    let later = Grant {
        generation: Generation(8),
        ..grant()
    };
    let since = mint(&later, start()).text;

    let verdict = |token, revoked: &Revoked| {
        Shown {
            revoked: revoked.clone(),
            ..Shown::of(token)
        }
        .verdict()
        .map(|counted| counted.grant.generation)
    };

    assert_eq!(verdict(&before, &revoked), Err(Rejected::Revoked(tenant())));
    assert_eq!(verdict(&since, &revoked), Ok(Generation(8)));
    assert_eq!(verdict(&before, &Revoked::unknown()), Err(Rejected::Revoked(tenant())));
    revoked.raise(Generation(9));
    assert_eq!(verdict(&since, &revoked), Err(Rejected::Revoked(tenant())));
}

#[test]
fn session_of_a_device_that_was_changed_gets_no_other_token() {
    let mut revoked = none_revoked();
    revoked.confirm(Generation(20));
    let mut granted = grant();

    assert!(granted.refresh(&revoked));
    assert_eq!(granted.generation, Generation(20));
    revoked.revoke_now(device(1));

    assert!(!granted.refresh(&revoked));
}

#[test]
fn renewals_of_a_fleet_are_spread_over_six_hours() {
    let mut hours = [0_u32; 24];
    for n in 0..60_000 {
        let after = renewal(device(n), LIFE);
        assert!((LIFE / 2..=LIFE * 3 / 4).contains(&after), "{after:?}");
        hours[usize::try_from(after.as_secs() / 3_600).unwrap().min(17)] += 1;
    }

    for count in &hours[12..18] {
        assert!((9_000..=11_000).contains(count), "{hours:?}");
    }
}

#[test]
fn full_set_raises_the_floor_instead_of_forgetting() {
    let mut revoked = Revoked::of(Generation(1), Generation(0), []);
    let max = u32::try_from(REVOKED_MAX).unwrap();

    for n in 1..=max + 10 {
        revoked.revoke(device(n.into()), Generation(n));
    }

    assert_eq!(revoked.devices().len(), REVOKED_MAX);
    assert_eq!(revoked.floor(), Generation(10));
    assert!(!revoked.allows(device(1), Generation(0)), "dropped, and still refused");
    assert!(!revoked.allows(device(1 << 40), Generation(9)));
    assert!(revoked.allows(device(1 << 40), Generation(10)));
    assert!(!revoked.allows(device(u128::from(max)), Generation(max - 1)));
}

proptest! {
    /// Compares with a plain list: a revocation is never forgotten in any order of events, and a repeated or late one
    /// changes nothing.
    #[test]
    fn revocations_count_in_any_order(
        told in prop::collection::vec((0_u128..8, 1_u32..50), 0..60),
        floors in prop::collection::vec(0_u32..30, 0..3),
        asked in prop::collection::vec((0_u128..8, 0_u32..60), 1..40),
    ) {
        let mut revoked = Revoked::of(Generation(0), Generation(0), []);
        for (n, at) in &told {
            revoked.revoke(device(*n), Generation(*at));
        }
        for floor in &floors {
            revoked.raise(Generation(*floor));
        }
        let floor = floors.iter().copied().max().unwrap_or_default();

        for (n, generation) in asked {
            let is_revoked = generation < floor || told.iter().any(|(m, at)| *m == n && generation < *at);
            prop_assert_eq!(revoked.allows(device(n), Generation(generation)), !is_revoked);
        }
        let again = Revoked::of(revoked.known(), revoked.floor(), revoked.devices());
        prop_assert!(again.devices().eq(revoked.devices()));
    }

    #[test]
    fn no_text_of_another_makes_a_token(text in "[A-Za-z0-9_-]{0,300}") {
        prop_assert_eq!(Shown::of(&text).verdict(), Err(Rejected::Invalid));
    }
}
