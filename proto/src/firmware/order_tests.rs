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
        "1.1.1-h6",
        "1.1.1 SR2",
        "1.1.1SU9",
        "1.1.1(4)",
        "1.1.1(25g)",
        "1.1.1(4)20",
        "1.1.1-RELEASE-p3",
        "1.1.1-final-4",
        "1.1.1-lts.4",
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
        "1.1.1-h",
        "1.1.1-sr",
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
        "1.4.4 = 1.4.4 07a3ca9 = 1.4.4@07a3ca9 = 1.4.4#07a3ca9 = 1.4.4 g6d2a586",
        "1.4.4 1234567",
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
fn number_in_brackets_directly_behind_a_digit_is_compared() {
    assert_ascending(&[
        "9.8 = 9.8 (4) = 9.8(x4) = 9.8()",
        "9.8(2)",
        "9.8(4) = 9.8(4) (5) = 9.8(4)(asa)",
        "9.8(4)20",
        "9.8(10)",
    ]);
    assert_ascending(&["7.0(3)I7(9) = 7.0(3)i7(09)", "7.0(3)I7(9w)", "7.0(3)I7(10)"]);
    assert_ascending(&["1.0 = 1.0(25gx)", "1.0(25)", "1.0(25g)"]);
}

#[test]
fn hexadecimal_number_is_one_release_number() {
    assert_ascending(&[
        "9",
        "0x9",
        "0x0a = 0XA = fw-0x000a",
        "10",
        "0x10-rc1",
        "0x10",
        "0x10-4",
        "0x264a0700",
        "0x26500700",
        "0x264a07000",
    ]);
    assert_ascending(&["0x26z", "0xg1", "0", "0x0"]);
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

/// Versions of public firmware in the order of their release, as their source lists them.
#[test]
fn histories_of_public_firmware_sort_as_they_were_released() {
    for (source, history) in HISTORIES {
        println!("{source}");
        assert_ascending(&history.split(" < ").collect::<Vec<_>>());
    }
}

/// Where a history is published, and its versions.
const HISTORIES: [(&str, &str); 34] = [
    (
        "ESPHome, changelogs",
        "1.20.4 < 2021.8.0-dev < 2021.8.0b1 < 2021.8.0b3 < 2021.8.0 < 2021.8.2 < 2021.10.0b1 < 2021.10.0 < \
         2021.12.3 < 2022.2.5 < 2023.12.9 < 2024.2.0",
    ),
    (
        "Tasmota, CHANGELOG.md",
        "9.5.0 < 9.5.0.8 < 9.5.0.9 < 10.0.0(tasmota) = 10.0.0 < 10.0.0.4 < 10.1.0 < 10.1.0.8 < 11.0.0 < \
         11.0.0.6(tasmota32) < 11.1.0 < 13.2.0(tasmota32-DE)",
    ),
    (
        "OpenWrt, release history",
        "19.07.0-rc1 < 19.07.0-rc2 < 19.07.0 < 19.07.10 < 21.02.0-rc4 < 21.02.0 < 22.03.0-rc6 < 22.03.0 < \
         22.03.7 < 23.05-SNAPSHOT < 23.05.0-rc4 < 23.05.0 < 24.10.0-rc7 < 24.10.0",
    ),
    (
        "Shelly, firmware archive of the first generation",
        "20190821-095324/v1.5.2@4148d2b7 < 20200309-104554/v1.6.0@43056d58 < \
         20230503-101129/v1.13.0-g9aed950 < 20230913-113421/v1.14.0-gcb84623 < \
         20231107-164219/v1.14.1-rc1-g0617c15",
    ),
    (
        "Shelly, change log of the second generation",
        "0.14.1 < 1.0.0-beta1 < 1.0.0-beta6 < 1.0.0 < 1.0.8 < 1.4.4-beta1-g6d2a586 < \
         1.4.4 = 1.4.4-g6d2a586 < 1.5.0-beta1 < 1.5.0",
    ),
    (
        "Ubiquiti EdgeOS, release notes",
        "v1.10.11 < v2.0.8 < v2.0.8-hotfix.1 < v2.0.9 < v2.0.9-hotfix.1.5371034.210122.1014 < \
         v2.0.9-hotfix.2 < v2.0.9-hotfix.6.5574651.221230.1015 < v2.0.9-hotfix.7 < v3.0.0",
    ),
    (
        "Ubiquiti UniFi access points, release notes",
        "4.3.20.11298 < 4.3.28.11361 < 5.43.23.12533 < 5.60.1.12923 < 6.0.21.13673 < 6.5.28.14491",
    ),
    (
        "Cisco ASA, release notes",
        "9.8(2) < 9.8(4) < 9.8(4)20 < 9.8(4)41 < 9.12(4) < 9.14(3)9 < 9.16(3) < 9.16(3)19 < 9.16(4) < \
         9.16(4)19",
    ),
    (
        "Cisco NX-OS of the Nexus 3000 and 9000, recommended releases",
        "7.0(3)I4(8b) < 7.0(3)I7(5a) < 7.0(3)I7(6) < 7.0(3)I7(7) < 7.0(3)I7(8) < 7.0(3)I7(9) < \
         7.0(3)I7(9w) < 7.0(3)I7(10) < 9.2(1) < 9.2(2) < 9.2(2t) < 9.2(3) < 9.3(8) < 9.3(10)",
    ),
    (
        "Cisco IOS of Catalyst switches, release notes",
        "12.2(55)SE < 12.2(55)SE1 < 12.2(55)SE12 < 15.0(2)SE < 15.0(2)SE11 < 15.2(4)E < 15.2(4)E10 < \
         15.2(7)E < 15.2(7)E0a < 15.2(7)E1 < 15.2(7)E10",
    ),
    (
        "Cisco IOS 12.4, release notes",
        "12.4(1) < 12.4(1a) < 12.4(8) < 12.4(12) < 12.4(25) < 12.4(25g)",
    ),
    (
        "Cisco IOS XE, release notes",
        "16.9.1 < 16.9.1s < 16.12.05 < 16.12.05b < 17.03.04 < 17.03.04a < 17.09.04a",
    ),
    (
        "Cisco IP Phone 8800, release notes",
        "10.3(1) < 10.3(1)SR5 < 11.0(1) < 12.5(1) < 12.5(1)SR1 < 12.8(1) < 12.8(1)SR1 < 12.8(1)SR2 < \
         14.0(1)SR3",
    ),
    (
        "Cisco Unified Communications Manager, release notes",
        "11.5(1) < 11.5(1)SU1 < 11.5(1)SU9 < 11.5(1)SU10 < 12.5(1) < 12.5(1)SU7",
    ),
    (
        "Juniper Junos, release notes",
        "18.4R1.8 < 18.4R1-S1 < 18.4R2.7 < 18.4R2-S10 < 18.4R3.3 < 18.4R3-S9.2 < 19.4R3-S2.2 < 20.2R1.10 < \
         21.4R3-S5.4",
    ),
    (
        "Palo Alto Networks PAN-OS, release notes",
        "10.1.0-b6 < 10.1.0 < 10.1.5 < 10.1.5-h1 < 10.1.5-h3 < 10.1.6 < 10.1.6-h3 < 10.1.6-h6 < 10.1.6-h7 < \
         10.1.7 < 10.2.0 < 10.2.0-h1 < 10.2.1",
    ),
    (
        "pfSense, release notes",
        "2.4.3-RELEASE < 2.4.3-RELEASE-p1 < 2.4.4-RELEASE < 2.4.4-RELEASE-p1 < 2.4.4-RELEASE-p3 < 2.4.5-RC < \
         2.4.5-RELEASE = 2.4.5 < 2.4.5-RELEASE-p1 < 2.5.0-RELEASE",
    ),
    (
        "FreeBSD, security advisories",
        "12.1-BETA1 < 12.1-RC2 < 12.1-RELEASE < 12.1-RELEASE-p1 < 12.1-RELEASE-p10 < 12.2-RELEASE < \
         13.0-CURRENT < 13.0-RELEASE",
    ),
    (
        "TrueNAS, release notes",
        "11.3-RC2 < 11.3-RELEASE < 11.3-U1 < 11.3-U4.1 < 11.3-U5 < 12.0-BETA1 < 12.0-RC1 < 12.0-RELEASE < \
         12.0-U1 < 12.0-U1.1 < 12.0-U8.1 < 13.0-U5.3 < 13.0-U6.1 < 22.12.3.3",
    ),
    (
        "MikroTik RouterOS, change log",
        "6.48.6 (long-term) < 6.49beta54 (testing) < 6.49 (stable) < 6.49.10 (long-term) < \
         7.1beta6 (development) < 7.1rc1 < 7.1rc7 < 7.1 (stable) < 7.12rc1 (testing) < 7.12 (stable) < \
         7.12.1 (stable)",
    ),
    (
        "Asuswrt-Merlin, changelog",
        "384.13 < 384.13_4 < 384.13_10 < 384.19_beta1 < 384.19 < 386.7 < 386.7_2 < 388.2 < 388.2_2 < \
         3004.388.4 < 3004.388.8_2 < 3004.388.8_4",
    ),
    (
        "Raspberry Pi bootloader, release notes of rpi-eeprom",
        "2020-09-03 < 2020-12-14 < 2021-04-29 < 2022-04-26 < 2023-01-11 < 2024-04-15",
    ),
    (
        "Sonos, device descriptions of S1 and S2",
        "54.2-72031 < 57.2-77280 < 57.3-77280 < 57.16-41110 < 79.1-53080",
    ),
    (
        "Hikvision, firmware downloads",
        "V5.4.5 build 170124 < V5.5.53 build 180730 < V5.5.82 build 190220 < V5.5.82 build 190909 < \
         V5.5.82build190910 < V5.5.82 build 191205 < V5.6.3",
    ),
    (
        "Synology DSM, release notes",
        "6.2.4-25556 < 6.2.4-25556 Update 2 < 7.0-41890 < 7.1.1-42962 < 7.1.1-42962 Update 1 < \
         7.1.1-42962 Update 9 < 7.2-64561 < 7.2-64570 < 7.2-64570 Update 1 < 7.2.1-69057 Update 5",
    ),
    (
        "QNAP QTS, release notes",
        "4.3.6.0993 Build 20190704 < 5.0.1.2277 build 20230112 < 5.1.0.2348 build 20230325 < \
         5.1.0.2399 build 20230515",
    ),
    (
        "dresden elektronik ConBee II, firmware changelog: Zigbee file versions",
        "0x26420700 < 0x264a0700 = 0x264A0700 = deCONZ_ConBeeII_0x264a0700 < 0x26570700 < 0x26580700 < \
         0x26650700 < 0x26660700 < 0x26680700 < 0x266b0700 < 0x26780700",
    ),
    (
        "WLED, releases",
        "0.14.4 < 0.15.0-b1 < 0.15.0-b2 < 0.15.0-b7 < 0.15.0-rc1 < 0.15.0 < 0.15.1",
    ),
    (
        "Victron Venus OS, change log",
        "v2.90~3 < v2.90~25 < v2.90 < v2.92 < v3.00~1 < v3.00~34 < v3.00",
    ),
    (
        "Particle Device OS, releases",
        "0.9.0 < 1.5.0-rc.1 < 1.5.0-rc.2 < 1.5.0 < 1.5.4-rc.1 < 1.5.4 < 2.0.0-rc.1 < 2.0.0-rc.4 < 2.0.0 < \
         3.0.0-beta.1 < 3.0.0-rc.1 < 3.0.0",
    ),
    (
        "ChromeOS, platform versions of the stable channel",
        "R96-14268.94.0 < R97-14324.80.0 < R99-14469.59.0 < R100-14526.111.0 < R102-14695.85.0",
    ),
    (
        "Android Things, artifacts of its library",
        "0.1-devpreview < 0.5-devpreview < 0.5.1-devpreview < 0.8-devpreview < 1.0",
    ),
    (
        "Tesla, car_version of the vehicle API",
        "2019.40.2.1 38f55d9f9205 = 2019.40.2.1 < 2019.40.50.7 ad132c7b057e < 2020.4.1 4a4ad401858f < \
         2020.12.5 e2179e0650f0",
    ),
    (
        "Alfen chargers, boot notifications (OCPP), and a version behind the protocol's",
        "1.6J-2.3.4 < 1.6J-2.3.10 < 1.6J-2.10.0 < 4.14.0-3398 < 5.8.1-4123 < 6.5.0-4230 < 7.4.5-4415",
    ),
];

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
        "(1a)",
        "-final1",
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
        "h",
        "0x",
        "0x2a",
        "(4a)",
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
