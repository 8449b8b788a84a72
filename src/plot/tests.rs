use super::check::check_markup;
use super::*;

#[test]
fn series_that_share_a_colour_differ_in_shape() {
    let marks: Vec<Mark> = (0..35).map(Mark::of).collect();
    for (i, a) in marks.iter().enumerate() {
        assert!(marks[..i].iter().all(|b| a.shape != b.shape || a.svg() != b.svg()), "series {i}");
    }
}

#[test]
fn a_line_plot_leaves_out_what_is_no_number() {
    let line = |points| Line { points, mark: Mark::of(0), faint: false, tooltip: "loss".into() };
    let points = vec![(0.0, 4.0), (1.0, f64::NAN), (2.0, f64::INFINITY), (3.0, 2.0)];
    let plot = Plot {
        label: "loss".into(),
        x: Axis::around("step", [0.0, 3.0]),
        y: Axis::around("loss", points.iter().map(|p| p.1)),
        x_guide: None,
        y_guide: Some(f64::NAN),
        lines: vec![line(points), line(Vec::new())],
        points: Vec::new(),
        readings: [f64::NAN, 2.0, 0.0].map(|x| Reading { x, tooltip: "a reading".into() }).into(),
    };
    let drawing = plot.svg();
    check_markup(&drawing).unwrap();
    assert!(!drawing.contains("NaN") && !drawing.contains("inf"));
    let first = drawing.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
    assert_eq!(first.split(' ').count(), 2, "{first}");
    assert_eq!(drawing.matches("<title>a reading").count(), 2);
}

#[test]
fn escaped_text_holds_no_markup() {
    assert_eq!(escape("<a href=\"x\">'&'\u{0}"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;\u{fffd}");
}
