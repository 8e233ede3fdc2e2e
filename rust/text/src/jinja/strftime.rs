//! `strftime` in the C locale, over a moment that the caller names.

use std::fmt::Write;

use super::eval::Clock;

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

struct Moment {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
    weekday: i64,
    yearday: i64,
    unix_s: i64,
}

impl Moment {
    fn at(clock: Clock) -> Self {
        // Years 0 to 9999, as Python's datetime.
        let local = clock.unix_s.saturating_add(clock.utc_offset_s.into()).clamp(-62_135_596_800, 253_402_300_799);
        let (days, seconds) = (local.div_euclid(86_400), local.rem_euclid(86_400));
        let (year, month, day) = civil(days);
        let yearday = days - days_before(year);
        Self {
            year,
            month,
            day,
            hour: seconds / 3600,
            minute: seconds / 60 % 60,
            second: seconds % 60,
            weekday: (days + 4).rem_euclid(7),
            yearday,
            unix_s: clock.unix_s,
        }
    }
}

/// Days since 1970 → date, by eras of 400 years that begin in March.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Days from 1970 to the first of January of a year.
fn days_before(year: i64) -> i64 {
    let y = year - 1;
    365 * (year - 1970) + (y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400)) - 477
}

pub(super) fn strftime(format: &str, clock: Clock) -> String {
    let moment = Moment::at(clock);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let start = chars.as_str();
        let mut directive = chars.next();
        let flag = directive.filter(|c| matches!(c, '-' | '_' | '0'));
        if flag.is_some() {
            directive = chars.next();
        }
        if !directive.is_some_and(|d| write_directive(&mut out, d, flag, &moment)) {
            // As glibc: what is no directive stands for itself.
            out.push('%');
            out.push_str(&start[..start.len() - chars.as_str().len()]);
        }
    }
    out
}

fn write_directive(out: &mut String, directive: char, flag: Option<char>, m: &Moment) -> bool {
    let hour12 = (m.hour + 11) % 12 + 1;
    let (value, width, fill) = match directive {
        'd' => (m.day, 2, '0'),
        'e' => (m.day, 2, ' '),
        'm' => (m.month, 2, '0'),
        'Y' => (m.year, 1, '0'),
        'y' => (m.year % 100, 2, '0'),
        'C' => (m.year / 100, 2, '0'),
        'H' => (m.hour, 2, '0'),
        'k' => (m.hour, 2, ' '),
        'I' => (hour12, 2, '0'),
        'l' => (hour12, 2, ' '),
        'M' => (m.minute, 2, '0'),
        'S' => (m.second, 2, '0'),
        'f' => (0, 6, '0'),
        'j' => (m.yearday + 1, 3, '0'),
        'w' => (m.weekday, 1, '0'),
        'u' => ((m.weekday + 6) % 7 + 1, 1, '0'),
        'U' => ((m.yearday + 7 - m.weekday) / 7, 2, '0'),
        'W' => ((m.yearday + 7 - (m.weekday + 6) % 7) / 7, 2, '0'),
        's' => (m.unix_s, 1, '0'),
        _ => return write_text(out, directive, m),
    };
    let (width, fill) = match flag {
        Some('-') => (0, fill),
        Some('_') => (width, ' '),
        Some(_) => (width, '0'),
        None => (width, fill),
    };
    let digits = value.to_string();
    out.extend(std::iter::repeat_n(fill, width - digits.len().min(width)));
    out.push_str(&digits);
    true
}

fn write_text(out: &mut String, directive: char, m: &Moment) -> bool {
    let day = DAYS[m.weekday as usize % 7];
    let month = MONTHS[(m.month as usize + 11) % 12];
    // Writing to a String cannot fail.
    let _ = match directive {
        'a' => write!(out, "{}", &day[..3]),
        'A' => write!(out, "{day}"),
        'b' | 'h' => write!(out, "{}", &month[..3]),
        'B' => write!(out, "{month}"),
        'p' => write!(out, "{}", if m.hour < 12 { "AM" } else { "PM" }),
        'P' => write!(out, "{}", if m.hour < 12 { "am" } else { "pm" }),
        'F' => write!(out, "{}-{:02}-{:02}", m.year, m.month, m.day),
        'D' | 'x' => write!(out, "{:02}/{:02}/{:02}", m.month, m.day, m.year % 100),
        'T' | 'X' => write!(out, "{:02}:{:02}:{:02}", m.hour, m.minute, m.second),
        'R' => write!(out, "{:02}:{:02}", m.hour, m.minute),
        'c' => write!(
            out,
            "{} {} {:2} {:02}:{:02}:{:02} {}",
            &day[..3],
            &month[..3],
            m.day,
            m.hour,
            m.minute,
            m.second,
            m.year
        ),
        'n' => writeln!(out),
        't' => write!(out, "\t"),
        '%' => write!(out, "%"),
        // A naive datetime has no zone.
        'z' | 'Z' => Ok(()),
        _ => return false,
    };
    true
}
