//! Which versions a range matches, and which errors a malformed one gives.

use proptest::prelude::*;

use super::{Range, compare};

fn range(text: &str) -> Range {
    text.parse().unwrap()
}

#[track_caller]
fn assert_holds(text: &str, inside: &[&str], outside: &[&str]) {
    let range = range(text);
    for firmware in inside {
        assert!(range.matches(Some(firmware)), "{text} holds {firmware:?}");
    }
    for firmware in outside {
        assert!(!range.matches(Some(firmware)), "{text} does not hold {firmware:?}");
    }
}

#[test]
fn ranges_mean_the_order_and_nothing_else() {
    assert_holds(
        "<3.8.1",
        &["3.8.1-b1", "v3.8.0", "0"],
        &["3.8.1", "3.8.1+x", "3.8.1-1", "4"],
    );
    assert_holds(
        ">=3.8.0-b3",
        &["3.8.0-b3", "3.8.0-b10", "3.8.0", "FW_9"],
        &["3.8.0-b2", "3.7"],
    );
    assert_holds(
        ">3.8",
        &["3.8.0-1", "3.8.0d", "3.8.0.1"],
        &["3.8.0", "v3.8+x", "3.8-rc1"],
    );
    assert_holds("<= 3.8", &["3.8.0", "3.8-rc1"], &["3.8.0-1", "3.8.1-b1"]);
    assert_holds("=3.8", &["v3.8.0+x", "3.8"], &["3.8.1", "3.8.0-b1"]);
    assert_holds("!=3.8", &["3.8.1", "3.8.0-b1"], &["v3.8.0+x"]);
    assert_holds(
        ">=3.8.0-b3, <3.9, !=3.8.5",
        &["3.8.0-b3", "3.9-b1", "3.8.4"],
        &["3.8.5", "3.9", "3.8.0-b2"],
    );
    assert_holds(">=3.9,<3.8", &[], &["3.8", "3.9", "3.8.5"]);
}

#[test]
fn wildcards_hold_all_whose_release_numbers_begin_so() {
    assert_holds(
        "3.8.*",
        &[
            "3.8",
            "3.8.0-dev",
            "3.8.7.1",
            "v3.8.0-9-gabcdef",
            "3.8.99999999999999999999999",
        ],
        &["3.9-dev", "3.7.9", "3.80", "3", "dev"],
    );
    assert_holds("!=3.8.*", &["3.9-dev", "3.7.9", "3"], &["3.8-dev", "3.8.1"]);
    assert_holds("3.*", &["3-b1", "3.99"], &["4-dev", "2.9", "30"]);
    assert_holds("v3.0.*", &["3", "3.0.1", "3-rc1"], &["3.1-rc1", "2.9"]);
    assert_holds("9.99.*", &["9.99.1"], &["9.100-dev", "10.0"]);
    assert_holds(
        "99999999999999999999999.*",
        &["99999999999999999999999.1"],
        &["100000000000000000000000-dev"],
    );
    assert_holds("2025-11.*", &["2025-11-02", "2025.11.0b3"], &["2025-12-01"]);
    assert_holds(
        "3.8.*,>=3.8.0-b3,!=3.8.1",
        &["3.8.0-b3", "3.8.2"],
        &["3.8.0-b2", "3.8.1", "3.9"],
    );
}

#[test]
fn versions_without_a_digit_and_missing_ones_are_held_by_nothing_but_equality() {
    for text in [
        "!=3.8",
        "<9",
        ">=0",
        "!=3.8.*",
        "0.*",
        "!=dev",
        "!=(none)",
        "=dev,>=0",
        "=dev,=main",
        "=dev,=(none)",
    ] {
        assert_holds(text, &[], &["dev", "", "  ", "(none)", "main"]);
        assert!(!range(text).matches(None), "{text}");
    }
    assert_holds(
        "=Main",
        &["main", "MAIN", " main ", "main+abc1"],
        &["main2", "mai", "", "1"],
    );
    assert_holds("=main+x, =MAIN", &["main"], &["dev"]);
    assert_holds("!=dev", &["1", "dev1"], &["dev", "main"]);
    assert_holds("=(none)", &["", " ", "(none)"], &["none", "1", "dev"]);
    assert!(range("= (NONE)").matches(None));
    assert!(!range("=main").matches(None));
}

#[test]
fn a_broken_range_says_what_is_wrong_and_where() {
    let said = |text: &str| text.parse::<Range>().unwrap_err().to_string();

    assert_eq!(
        said("  "),
        "at character 1: the range is empty; leave it out to match every version"
    );
    assert_eq!(
        said("3.8.0"),
        "at character 1: a version needs an operator, as in `=3.8.0` or `>=3.8.0`"
    );
    assert_eq!(
        said("main"),
        "at character 1: a version needs an operator, as in `=main`"
    );
    assert_eq!(said(">=3.8,"), "at character 7: a version is expected here");
    assert_eq!(said(">=3.8, <"), "at character 9: a version is expected here");
    assert_eq!(
        said(">=3.8, =>4"),
        "at character 8: unknown operator `=>`; expected one of = != < <= > >="
    );
    assert_eq!(
        said("\u{e9}=1"),
        "at character 1: a version needs an operator, as in `=\u{e9}=1` or `>=\u{e9}=1`"
    );
    assert_eq!(
        said(">=3.8 <3.9"),
        "at character 7: a new condition needs a comma in front of it"
    );
    assert_eq!(
        said("=1 || =2"),
        "at character 7: a new condition needs a comma in front of it"
    );
    assert_eq!(said("=1\u{7}"), "at character 3: control characters are not allowed");
    assert_eq!(
        said(">=beta"),
        "at character 3: `beta` has no digit, so it has no place in a range; only `=` and `!=` take it"
    );
    assert!(said(&format!("={}", "1".repeat(Range::LEN_MAX))).ends_with("longer than 512 bytes"));
    for text in [
        "*",
        "=3.8.*",
        ">=3.8.*",
        "3.*.1",
        "3.8*",
        "3.8.0-b*",
        "3.8.0-b3.*",
        "v.*",
        "!=*",
        "3.8.*.*",
        "3.8+x.*",
        "=3.8.0+*",
        "3.8..*",
        "0x26.*",
    ] {
        assert!(said(text).contains("`*` stands only for"), "{text}: {}", said(text));
    }
    for text in ["==1", "^1", "~1", "~>1", "<>1", "!1", "1,", ",", "=", "!=", "3.8.* 4"] {
        assert!(text.parse::<Range>().is_err(), "{text}");
    }
}

#[test]
fn ranges_that_hold_the_same_versions_are_the_same() {
    for (left, right, is_same) in [
        (">=3.8", " >= v3.8.0+x ", true),
        (">=3.8,<3.9", "<3.9,>=3.8", true),
        ("!=3.8.5,3.8.*", "3.8.*,!=3.8.5", true),
        ("=main", "=MAIN", true),
        ("=(none)", "= (NONE)", true),
        (">=2,<1", ">3,<3", true),
        (">=3.8", ">3.8", false),
        (">=3.8", ">=3.8-b1", false),
        ("=main", "=(none)", false),
        ("3.8.*", ">=3.8,<3.9", false),
        ("!=main", "=main", false),
    ] {
        assert_eq!(range(left).is_same_as(&range(right)), is_same, "{left} {right}");
    }
}

#[test]
fn a_range_is_written_as_it_was_read() {
    let range = range("  >=3.8.0-b3 , <3.9 ");

    assert_eq!(range.to_string(), ">=3.8.0-b3 , <3.9");
    assert_eq!(serde_json::to_string(&range).unwrap(), "\">=3.8.0-b3 , <3.9\"");
    assert_eq!(serde_json::from_str::<Range>("\">=3.8.0-b3 , <3.9\"").unwrap(), range);
    assert!(
        serde_json::from_str::<Range>("\"3.8\"")
            .unwrap_err()
            .to_string()
            .contains("at character 1")
    );
}

const VERSIONS: [&str; 24] = [
    "0",
    "1.0~rc1",
    "1.0-dev",
    "1.0-b2",
    "1.0-b10",
    "v1.0",
    "1.0.0+x",
    "1.0-1~exp1",
    "1.0-1",
    "1.0d",
    "1.0-p1",
    "1.0-9-gabcdef",
    "1.0.1",
    "1.1-dev",
    "1.1",
    "1.9",
    "1.10",
    "2-rc1",
    "2",
    "2.0.1",
    "2025-11-02",
    "20251102",
    "99999999999999999999",
    "100000000000000000000",
];

proptest! {
    #[test]
    fn a_range_holds_what_each_condition_says(
        conditions in prop::collection::vec((prop::sample::select(vec!["=", "!=", "<", "<=", ">", ">="]), prop::sample::select(VERSIONS.to_vec())), 1..6),
        firmware in prop::sample::select(VERSIONS.to_vec()),
    ) {
        let text = conditions.iter().map(|(operator, version)| format!("{operator}{version}")).collect::<Vec<_>>().join(",");
        let expected = conditions.iter().all(|(operator, version)| {
            let order = compare(firmware, version);
            match *operator {
                "=" => order.is_eq(),
                "!=" => order.is_ne(),
                "<" => order.is_lt(),
                "<=" => order.is_le(),
                ">" => order.is_gt(),
                _ => order.is_ge(),
            }
        });

        prop_assert_eq!(range(&text).matches(Some(firmware)), expected, "{} {}", text, firmware);
    }

    #[test]
    fn any_text_is_a_range_or_an_error_inside_of_it(text in prop_oneof![any::<String>(), "[=!<>]{0,2}[v0-9a.*,~ +-]{0,12}"]) {
        match text.parse::<Range>() {
            Ok(range) => prop_assert_eq!(range.as_str(), text.trim()),
            Err(error) => prop_assert!(error.position >= 1 && error.position <= text.chars().count() + 1),
        }
    }
}

#[test]
fn release_with_a_hash_or_a_remark_is_held_as_the_release() {
    for (range, version, is_held) in [
        (">=1.4.4", "1.4.4-g6d2a586", true),
        ("<1.4.4", "1.4.4-g6d2a586", false),
        ("=1.4.4", "1.4.4-g6d2a586", true),
        (">=1.4.4", "1.4.4-g1234567", true),
        (">=1.4.5", "1.4.4-g6d2a586", false),
        ("<1.4.4", "1.4.3-gffffff0", true),
        ("<1.4.4", "1.4.4-beta1-g6d2a586", true),
        (">=13.2.0", "13.2.0(tasmota)", true),
        ("<13.2.0", "13.2.0(tasmota)", false),
        ("=13.2.0", "13.2.0(sensors)", true),
        ("=13.2.0(sensors)", "13.2.0", true),
        (">=7.14.3", "7.14.3 (stable)", true),
        ("<7.14.3", "7.14.3 (stable)", false),
        (">=6.49.10", "6.49.10 (long-term)", true),
        ("<7.12", "7.12rc1 (testing)", true),
        ("<7.1", "7.1beta6 (development)", true),
        (">=1.1.1", "1.1.1 (45)", true),
        ("1.16.*", "v1.16.0-07a3ca9", true),
        ("<=1.16.0", "v1.16.0-07a3ca9", true),
        ("<=1.16.0", "v1.16.0-1234567", false),
        ("=3.8", "3.8.0.Final", true),
        (">3.8", "3.8u2", true),
        ("<=9.16(3)19", "9.16(3)", true),
        ("<=9.16(3)19", "9.16(4)", false),
        ("=9.16(4)", "9.16(3)", false),
        ("9.16.*", "9.16(4)19", true),
        (">=2.4.4-RELEASE", "2.4.4-RELEASE-p3", true),
        ("<0x26500700", "0x264a0700", true),
        ("<0x26500700", "deCONZ_ConBeeII_0x26780700.bin", false),
    ] {
        let parsed: Range = range.parse().unwrap();

        assert_eq!(parsed.matches(Some(version)), is_held, "{range} and {version}");
    }
}
