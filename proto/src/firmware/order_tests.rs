//! The order of versions: its documented rules, lists from the field, and its laws.

use std::cmp::Ordering;

use proptest::prelude::*;

use super::{Version, compare};

/// Each text before the next; texts that are joined by ` = ` have the same place.
fn assert_ascending(rows: &[&str]) {
    let texts: Vec<(usize, &str)> = rows
        .iter()
        .enumerate()
        .flat_map(|(place, row)| row.split(" = ").map(move |text| (place, text)))
        .collect();
    for (left_place, left) in &texts {
        for (right_place, right) in &texts {
            assert_eq!(
                compare(left, right),
                left_place.cmp(right_place),
                "{left:?} and {right:?}"
            );
        }
    }
}

/// Sorts, then checks each pair: an order that is not total or not transitive contradicts the sorted list somewhere.
fn assert_total_preorder(mut texts: Vec<String>) {
    texts.sort_by(|left, right| compare(left, right));
    let mut place = 0;
    let places: Vec<usize> = texts
        .iter()
        .enumerate()
        .map(|(at, text)| {
            place += usize::from(at > 0 && compare(&texts[at - 1], text).is_ne());
            place
        })
        .collect();
    for (left, left_place) in texts.iter().zip(&places) {
        for (right, right_place) in texts.iter().zip(&places) {
            assert_eq!(
                compare(left, right),
                left_place.cmp(right_place),
                "{left:?} and {right:?}"
            );
        }
    }
}

#[test]
fn text_before_the_first_digit_letter_case_and_build_metadata_do_not_count() {
    assert_ascending(&[
        "FW_1.2.9 = 1.2.9 = fw-1.2.9+exp.sha.5114f85",
        "FW_1.2.10 = v1.2.10 = release-1.2.10 = Version 1.2.10",
        "3.8.0-RC1 = v3.8.0-rc1 = 3.8.0-rc1+build.7",
        "v3.8.0 = V3.8.0 = 3.8.0+build5 = 3.8.0+build10 =  3.8.0\t = +3.8",
    ]);
}

#[test]
fn release_numbers_compare_as_numbers_part_by_part() {
    assert_ascending(&[
        "0 = 0.0 = v00",
        "0.9",
        "3.8 = 3.8.0 = 3.08.00 = 3.8.0.0.0",
        "3.8.0.1",
        "3.8.0.12",
        "3.8.1",
        "3.9",
        "3.10",
        "3.18446744073709551615",
        "3.18446744073709551616",
        "3.99999999999999999999999999999999999999",
        "3.100000000000000000000000000000000000000",
        "4",
    ]);
}

#[test]
fn dates_are_numbers_and_their_hyphens_belong_to_the_release() {
    assert_ascending(&[
        "1.2",
        "2024-12-31",
        "release-2025-1-2 = 2025-01-02 = 2025.1.2 = 2025_01_02 = 2025/01/02",
        "2025-01-10",
        "2025-11-02-rc1",
        "2025-11-02 = 2025.11.2",
        "2025-11-02-1",
        "2025-11-10",
        "20251102",
        "20251102-1",
        "20251110",
    ]);
}

#[test]
fn a_hyphen_begins_a_build_number_unless_the_first_number_is_a_year() {
    assert_ascending(&["1.2.3", "1.2.3-4", "1.2.3-10", "1.2.3.1", "1.2.4"]);
    assert_ascending(&[
        "2024.1.3",
        "2024.1.3.1",
        "2024.1.3-4 = 2024.1.3.4",
        "2024.1.3-10",
        "2024.1.4",
    ]);
    assert_ascending(&["202", "202-11", "202.1"]);
}

#[test]
fn what_is_not_released_yet_sorts_before_the_release_naturally() {
    assert_ascending(&[
        "3.8.0-dev",
        "3.8.0-dev2",
        "3.8.0-nightly",
        "3.8.0-nightly.20251102",
        "3.8.0-SNAPSHOT",
        "3.8.0-alpha",
        "3.8.0-alpha.1 = 3.8.0-alpha1 = 3.8.0alpha1",
        "3.8.0-alpha.beta",
        "3.8.0-b",
        "3.8.0-b2 = 3.8.0-b02",
        "3.8.0-b3 = 3.8.0-b.3 = 3.8.0b3",
        "3.8.0-b3.1",
        "3.8.0-b3-dev",
        "3.8.0-b10",
        "3.8.0-b99999",
        "3.8.0-beta",
        "3.8.0-rc1 = 3.8.0.rc1",
        "3.8.0-rc1-9-gabcdef",
        "3.8.0-rc2",
        "3.8.0",
    ]);
    assert_ascending(&["2025.11.0b3", "2025.11.0b10", "2025.11.0"]);
    assert_ascending(&["1.4.0.rc3", "1.4.0.rc10", "1.4.0"]);
    assert_ascending(&["v5.1.1", "v5.1.2-dirty", "v5.1.2"]);
}

#[test]
fn a_tilde_sorts_before_the_end() {
    assert_ascending(&[
        "1.0~~",
        "1.0~",
        "1.0~beta1",
        "v1.0.0~rc1 = 1.0~rc1",
        "1.0~rc1-1",
        "1.0-rc1~2",
        "1.0-rc1",
        "1.0",
        "1.0-1~exp1",
        "1.0-1",
        "1.0a~1",
        "1.0a",
        "1.0-p1~x",
        "1.0-p1",
    ]);
}

#[test]
fn builds_patches_single_letters_and_git_describe_sort_after_the_release() {
    for later in [
        "1.1.1-4",
        "1.1.1-0",
        "1.1.1-4.5",
        "1.1.1_4",
        "1.1.1d",
        "1.1.1D",
        "1.1.1-post1",
        "1.1.1.post1",
        "1.1.1-p1",
        "1.1.1p1",
        "1.1.1p",
        "1.1.1-patch2",
        "1.1.1-fix",
        "1.1.1-hotfix.3",
        "1.1.1-HOTFIX",
        "1.1.1-r3",
        "1.1.1r3",
        "1.1.1-rev4",
        "1.1.1-9-gabcdef",
        "1.1.1-9-g12e4567",
        "1.1.1-9-gabcdef-dirty",
        "1.1.1-4b",
        "1.1.1za",
        "1.1.1pr",
        "1.1.1ea",
        "1.1.1cr",
        "1.1.1-build7",
        "1.1.1 Build 7",
        "1.1.1build7",
        "1.1.1-SP1",
        "1.1.1sp1",
        "1.1.1u202",
        "1.1.1-u202",
        "1.1.1_update.4",
        "1.1.1 Update 4",
        "1.1.1-hf12",
        "1.1.1-hf12-final",
        "1.1.1-4-g0a1b2c3 (stable)",
        "1.1.1+x",
    ] {
        let wanted = if later == "1.1.1+x" {
            Ordering::Equal
        } else {
            Ordering::Greater
        };
        assert_eq!(compare(later, "1.1.1"), wanted, "{later}");
        assert_eq!(compare(later, "1.1.2-dev"), Ordering::Less, "{later}");
        assert_eq!(compare(later, "1.1.1.0.1-dev"), Ordering::Less, "{later}");
    }
    for earlier in [
        "1.1.1-b",
        "1.1.1-d",
        "1.1.1.d",
        "1.1.1rc",
        "1.1.1zaz",
        "1.1.1-za",
        "1.1.1d1",
        "1.1.1d-rc1",
        "1.1.1-patched",
        "1.1.1-final-b1",
        "1.1.1-build",
        "1.1.1-update",
        "1.1.1-4-rc1",
        "1.1.1-gabcdef-dirty",
        "1.1.1-9-gabcxyz",
        "1.1.1-preview",
        "1.1.1~1",
        "1.1.1~p1",
        "1.1.1\u{e9}x",
    ] {
        assert_eq!(compare(earlier, "1.1.1"), Ordering::Less, "{earlier}");
        assert_eq!(compare(earlier, "1.1.0.9-p9"), Ordering::Greater, "{earlier}");
    }
    assert_ascending(&["1.1.1", "1.1.1a", "1.1.1d", "1.1.1w", "1.1.2"]);
    assert_ascending(&[
        "1.2.3",
        "1.2.3-9",
        "1.2.3-9-gabcdef",
        "1.2.3-9-gabcdef-dirty",
        "1.2.3-10-gabcdee",
        "1.2.4",
    ]);
    assert_ascending(&["1.2", "1.2-p1", "1.2-p2", "1.2-p10", "1.2-patch1"]);
    assert_ascending(&["2025.11.0", "2025.11.0-9-gabcdef", "2025.11.0-10-gabcdef", "2025.11.1"]);
    assert_ascending(&["2025-11-01", "2025-11-02 = 2025-11-02-gabcdef", "2025-11-03"]);
}

#[test]
fn commit_hash_at_the_end_is_not_compared() {
    assert_ascending(&[
        "1.4.3-gffffff0 = 1.4.3",
        "1.4.4-beta1-g6d2a586 = 1.4.4-beta1",
        "1.4.4 = 1.4.4-g6d2a586 = 1.4.4-g1234567 = 1.4.4-gabcdef = 1.4.4_G6D2A586 = 1.4.4-07a3ca9 = 1.4.4.07a3ca9 = 1.4.4_a07bca9 = 1.4.4-b1234567 = \
         1.4.4-0123456789abcdef0123456789abcdef01234567",
        "1.4.4-4 = 1.4.4-4-07a3ca9",
        "1.4.4-9",
        "1.4.4-9-g6d2a586",
        "1.4.4-1234567",
    ]);
    assert_ascending(&[
        "9.0.0.4.386.41615-g7c2264e = 9.0.0.4.386.41615",
        "9.0.0.4.386.41616-g0c2264e",
    ]);
    assert_ascending(&["3.0.0.4.386_9-g7c2264e", "3.0.0.4.386_49703-g0c2264e"]);
    assert_ascending(&[
        "2025-11-02 = 2025-11-02-07a3ca9 = 2025.11.2.07a3ca9",
        "2025-11-03-07a3ca9",
    ]);
    for not_a_hash in [
        "1.4.4-g6d2a5",
        "1.4.4-07a3ca",
        "1.4.4-07a3cax",
        "1.4.4-b3",
        "1.4.4-b10",
        "1.4.4-a12",
        "1.4.4-b12345",
        "1.4.4-abcdefa",
    ] {
        assert_ne!(compare(not_a_hash, "1.4.4"), Ordering::Equal, "{not_a_hash}");
    }
}

#[test]
fn remark_in_round_brackets_at_the_end_is_not_compared() {
    assert_ascending(&[
        "7.1beta6 (development) = 7.1beta6",
        "7.1 = 7.1 (stable) = 7.1(tasmota32-DE) = 7.1 (a (b) c) = 7.1 (x) (y) = 7.1-g6d2a586 (stable) = 7.1(lite+zigbee) = 7.1(x)+build = 7.1 (45) = 7.1 (45) (stable)",
        "7.1-45 = 7.1-45 (46)",
        "7.1.1 (long-term)",
    ]);
    assert_ascending(&["7.1 (alpha", "7.1 (stable = 7.1 stable) = 7.1"]);
    assert_ascending(&["7.1 (a~b)", "7.1"]);
}

#[test]
fn words_for_a_release_at_the_end_are_not_compared() {
    assert_ascending(&[
        "3.8.0-final-rc2 = 3.8.0-FINAL-rc2-stable",
        "3.8.0-finale",
        "3.8.0-nonfinal",
        "3.8.0-rc1-final = 3.8.0-rc1",
        "3.8.0 = 3.8.0-stable = 3.8.0.Final = 3.8.0_RELEASE = 3.8.0ga = 3.8.0 LTS = 3.8-prod = 3.8.0-final-lts = 3.8.0.GA-07a3ca9",
        "3.8.0-4 = 3.8.0-4-final",
        "3.8.0-p1 = 3.8.0-p1-stable",
    ]);
    assert_ascending(&["3.8.0-p1-stable~x", "3.8.0-p1"]);
}

#[test]
fn updates_service_packs_and_builds_sort_by_number() {
    assert_ascending(&["8-rc", "8", "8u9", "8u202 = 8-u202", "8u1000", "9"]);
    assert_ascending(&["6.5", "6.5 SP1", "6.5 SP2", "6.5 SP10", "6.6"]);
    assert_ascending(&["1.0.2", "1.0.2u", "1.0.2z", "1.0.2za", "1.0.2zb", "1.0.3"]);
    assert_ascending(&["1.0-build", "1.0", "1.0-build2", "1.0-build10"]);
}

#[test]
fn texts_without_a_digit_come_first_by_lower_case_text() {
    assert_ascending(&[
        " = \t",
        "(none)",
        "-",
        "Alpha = alpha",
        "MAIN = main = main+abc1234",
        "main-dirty",
        "unknown",
        "\u{c9} = \u{e9}",
        "\u{1f4a5}",
        "0-dev",
        "0",
    ]);
}

#[test]
fn lists_from_the_field_sort_as_people_mean() {
    assert_ascending(&[
        "v4.4.7-dirty",
        "v4.4.7",
        "v5.0-dev",
        "v5.0-beta1",
        "v5.0-rc1",
        "v5.0",
        "v5.0.1",
        "v5.1.2-dirty",
        "v5.1.2",
        "v5.1.2-25-g0123abc",
        "v5.1.2-105-gfedcba9-dirty",
        "v5.2-dev-1805-g9a1cc59cd4",
    ]);
    assert_ascending(&[
        "OpenWrt 21.02.7 r16847-f8282da11e",
        "OpenWrt 22.03.0-rc6 r19590-042d558536",
        "OpenWrt 22.03.0 r19685-512e76967f",
        "OpenWrt 23.05.2 r23630-842932a63d",
        "OpenWrt 23.05.10 r24000-aaaaaaaaaa",
    ]);
    assert_ascending(&[
        "SQ1A.220105.002",
        "SQ3A.220605.009.A1",
        "TQ3A.230705.001",
        "TQ3A.230805.001",
        "TQ3A.230805.001.A2",
        "AP4A.241205.013",
    ]);
    assert_ascending(&[
        "release-2024.9.3",
        "release-2024.10.1-rc.2",
        "release-2024.10.1-rc.10",
        "release-2024.10.1",
        "release-2024.10.1-hotfix1",
    ]);
    assert_ascending(&[
        "OpenSSL 1.0.2",
        "OpenSSL 1.0.2k",
        "OpenSSL 1.0.2u",
        "OpenSSL 1.1.0",
        "OpenSSL 1.1.1",
        "OpenSSL 1.1.1d",
        "OpenSSL 1.1.1w",
    ]);
    assert_ascending(&[
        "3.8.0-b2",
        "3.8.0-b3",
        "3.8.0-b10",
        "3.8.0-rc1",
        "3.8.0",
        "3.8.1-b1",
        "3.8.1",
        "3.10.0",
    ]);
}

#[test]
fn the_documented_list_is_in_order() {
    let page = include_str!("../../../docs/VERSIONS.md");
    let (_, list) = page.split_once("```order\n").unwrap();
    let (list, _) = list.split_once("\n```").unwrap();

    assert_ascending(&list.lines().collect::<Vec<_>>());
}

#[test]
fn every_short_text_of_awkward_characters_has_its_place() {
    let alphabet = ["1", "0", "a", "-", ".", "~", "+", "p", "(", ")", "ga"];
    let mut texts = vec![String::new()];
    let mut last = texts.clone();
    for _ in 0..3 {
        last = last
            .iter()
            .flat_map(|text| alphabet.map(|piece| format!("{text}{piece}")))
            .collect();
        texts.extend(last.iter().cloned());
    }
    assert_total_preorder(texts);
}

#[test]
fn long_texts_take_time_in_proportion() {
    for piece in [
        "1.",
        "1-",
        "2025-1",
        "a1",
        "~",
        "+",
        "-9-gab",
        "g1",
        "\u{e9}",
        "0",
        "p",
        "(",
        ")",
        "(a)",
        "-final",
        "-07a3ca9",
        "-9-07a3ca9",
        "(1)",
    ] {
        let long = format!("2025{}", piece.repeat(200_000));
        assert!(compare(&long, &long).is_eq());
    }
}

/// Texts that nearly collide: few pieces, in any order.
fn pieces() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "0",
        "1",
        "2",
        "3",
        "8",
        "10",
        "01",
        "2025",
        "11",
        "18446744073709551616",
        ".",
        ".",
        ".",
        "-",
        "-",
        "_",
        "/",
        " ",
        "~",
        "+",
        "v",
        "FW_",
        "a",
        "b",
        "B",
        "rc",
        "RC",
        "alpha",
        "beta",
        "dev",
        "nightly",
        "snapshot",
        "p",
        "patch",
        "post",
        "fix",
        "hotfix",
        "r",
        "rev",
        "gabcdef",
        "g12",
        "07a3ca9",
        "(",
        ")",
        "(stable)",
        "(4)",
        "final",
        "ga",
        "za",
        "build",
        "sp",
        "u",
        "-9-gabcdef",
        "d",
        "x",
        "\u{e9}",
        "\u{c9}",
        "\u{130}",
        "\u{df}",
        "\u{1f4a5}",
        "\u{663}",
    ]);
    prop::collection::vec(piece, 0..9).prop_map(|pieces| pieces.concat())
}

/// Texts of the kinds that fleets send.
fn versions() -> impl Strategy<Value = String> {
    let head = prop::sample::select(vec!["", "v", "FW_", "release-"]);
    let release = prop::sample::select(vec![
        "3.8",
        "3.8.0",
        "3.8.1",
        "3.10",
        "2025-11-02",
        "2025.11",
        "20251102",
        "1.1.1",
    ]);
    let tail = prop::sample::select(vec![
        "",
        "-b2",
        "-b10",
        "b3",
        ".rc3",
        "-rc.3",
        "-dev",
        "~rc1",
        "-1",
        "-1~exp1",
        "-9-gabcdef",
        "-9-gabcdef-dirty",
        "d",
        "-d",
        "-p1",
        "p1",
        "-hotfix.2",
        "-4-rc1",
        "+build",
        "-b2+x",
        "-dirty",
        "-g6d2a586",
        ".07a3ca9",
        "(tasmota)",
        " (stable)",
        " (45)",
        "-final",
        ".GA",
        "u202",
        "-sp1",
        "za",
    ]);
    (head, release, tail).prop_map(|(head, release, tail)| [head, release, tail].concat())
}

fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => pieces(),
        4 => versions(),
        1 => any::<String>(),
        1 => prop::collection::vec(any::<u8>(), 0..12).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
    ]
}

proptest! {
    #[test]
    fn the_order_is_a_total_preorder(texts in prop::collection::vec(any_text(), 0..24)) {
        assert_total_preorder(texts);
    }

    #[test]
    fn equal_versions_and_no_others_share_their_canonical_text(texts in prop::collection::vec(any_text(), 0..24)) {
        let canonical = |text: &str| {
            let mut canonical = String::new();
            Version::of(text).write_canonical(&mut canonical).map(|()| canonical)
        };
        for left in &texts {
            for right in &texts {
                prop_assert_eq!(canonical(left) == canonical(right), compare(left, right).is_eq(), "{} {}", left, right);
            }
        }
    }

    #[test]
    fn neighbours_in_the_alphabet_keep_the_laws(base in any_text(), tails in prop::collection::vec(pieces(), 0..12)) {
        let mut texts: Vec<String> = tails.iter().map(|tail| format!("{base}{tail}")).collect();
        texts.extend(tails.iter().map(|tail| format!("{tail}{base}")));
        texts.push(base);
        assert_total_preorder(texts);
    }

    #[test]
    fn what_does_not_count_changes_nothing(text in any_text(), other in any_text(), metadata in "[a-z0-9.+~-]{0,8}") {
        let order = compare(&text, &other);

        prop_assert_eq!(compare(&format!("  {text}\t"), &other), order);
        prop_assert_eq!(compare(&text.to_ascii_uppercase(), &other), order);
        if Version::of(&text).is_numbered() {
            prop_assert_eq!(compare(&format!("{text}+{metadata}"), &other), order);
            prop_assert_eq!(compare(&format!("+v{}", text.trim_start().trim_start_matches('+')), &other), order);
        }
    }

    #[test]
    fn a_tilde_at_the_end_of_a_version_sorts_before_it(head in any_text(), middle in "[0-9]", tail in pieces(), rest in pieces()) {
        let text = format!("{head}{middle}{tail}").replace('+', "");

        prop_assert_eq!(compare(&format!("{text}~{}", rest.replace('+', "")), &text), Ordering::Less);
    }
}
