//! What tests of reports ask of every page.

/// Fails unless every tag is closed in order, attributes are quoted and `<` and `&` stand escaped.
pub fn check_markup(text: &str) -> Result<(), String> {
    let mut open: Vec<String> = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(['<', '&', '>']) {
        let near = |at: &str| at.chars().take(60).collect::<String>();
        let here = &rest[start..];
        if let Some(after) = here.strip_prefix('&') {
            let entities = ["&amp;", "&lt;", "&gt;", "&quot;", "&#39;"];
            if !entities.iter().any(|e| here.starts_with(e)) {
                return Err(format!("a bare & at {:?}", near(here)));
            }
            rest = after;
            continue;
        }
        let end = here.find('>').ok_or_else(|| format!("an open tag at {:?}", near(here)))?;
        let tag = here.get(1..end).ok_or_else(|| format!("a bare > at {:?}", near(here)))?;
        rest = &here[end + 1..];
        if tag.contains('<') || tag.matches('"').count() % 2 == 1 {
            return Err(format!("a broken tag {tag:?}"));
        }
        let name = tag.trim_matches('/').split_whitespace().next().unwrap_or("");
        if let Some(closed) = tag.strip_prefix('/') {
            let expected = open.pop();
            if expected.as_deref() != Some(closed) {
                return Err(format!("</{closed}> where </{expected:?}> was due, before {:?}", near(rest)));
            }
        } else if !tag.ends_with('/') && !tag.starts_with('!') {
            open.push(name.into());
        }
    }
    if open.is_empty() { Ok(()) } else { Err(format!("never closed: {open:?}")) }
}

/// Fails on a page whose markup is broken or that draws a number that is none.
pub fn check_drawings(page: &str) -> Result<(), String> {
    let style = page.find("<style>").zip(page.find("</style>")).ok_or("no style")?;
    let without_style = format!("{}{}", &page[..style.0 + 7], &page[style.1..]);
    check_markup(&without_style)?;
    for drawing in without_style.split("<svg").skip(1) {
        let drawing = drawing.split("</svg>").next().unwrap_or("");
        for number in ["x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"] {
            for value in drawing.split(&format!(" {number}=\"")).skip(1) {
                let value = value.split('"').next().unwrap_or("");
                let number = value.parse::<f64>().map_err(|e| format!("{number}={value:?}: {e}"))?;
                if !(-2000.0..=20_000.0).contains(&number) {
                    return Err(format!("a coordinate far outside: {value}"));
                }
            }
        }
        for points in drawing.split(" points=\"").skip(1) {
            let points = points.split('"').next().unwrap_or("");
            if points.contains("NaN") || points.contains("inf") {
                return Err(format!("points {points:?}"));
            }
        }
    }
    Ok(())
}
