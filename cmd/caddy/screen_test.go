package main

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// terminal shows what a terminal would after the sequences that screen writes. It does not know any other.
type terminal struct {
	t      *testing.T
	lines  []string
	row    int
	hidden bool
}

var sequence = regexp.MustCompile(`^\x1b\[(\??\d*)([A-Za-z])`)

func (e *terminal) Write(p []byte) (int, error) {
	for text := string(p); text != ""; {
		if m := sequence.FindStringSubmatch(text); m != nil {
			e.control(m[1], m[2])
			text = text[len(m[0]):]
			continue
		}
		e.put(text[0])
		text = text[1:]
	}
	return len(p), nil
}

func (e *terminal) control(arg, command string) {
	switch command {
	case "F":
		n, err := strconv.Atoi(arg)
		if err != nil || n > e.row {
			e.t.Errorf("up %s from line %d", arg, e.row)
		}
		e.row -= n
		e.put('\r')
	case "H":
		e.row = 0
		e.put('\r')
	case "J":
		e.lines = e.lines[:min(e.row, len(e.lines))]
	case "h", "l":
		if arg != "?25" {
			e.t.Errorf("sequence %s%s", arg, command)
		}
		e.hidden = command == "l"
	case "K", "m": // lines are written from their start, which put handles
	default:
		e.t.Errorf("sequence %s%s", arg, command)
	}
}

// put writes at the end of the current line, which a line written from its start has emptied.
func (e *terminal) put(c byte) {
	for len(e.lines) <= e.row {
		e.lines = append(e.lines, "")
	}
	switch c {
	case '\n':
		e.row++
		if e.row < len(e.lines) {
			e.lines[e.row] = ""
		}
	case '\r':
		e.lines[e.row] = ""
	default:
		e.lines[e.row] += string(rune(c))
	}
}

func newTerminal(t *testing.T, width, height int) (*screen, *terminal) {
	e := &terminal{t: t}
	return &screen{out: e, live: true, color: true, size: func() (int, int) { return width, height }}, e
}

func (e *terminal) want(lines ...string) {
	e.t.Helper()
	if got := slices.DeleteFunc(slices.Clone(e.lines), func(s string) bool { return s == "" }); !slices.Equal(got, lines) {
		e.t.Errorf("on screen:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(lines, "\n"))
	}
}

func TestScreenRedrawsInPlace(t *testing.T) {
	s, e := newTerminal(t, 80, 24)
	s.print("title", "text")
	s.draw([]string{" BACKEND  X", "b1 ###", "b2 #"})
	e.want("title", "text", " BACKEND  X", "b1 ###", "b2 #")
	if !e.hidden {
		t.Error("the cursor shows in the block")
	}
	s.draw([]string{" BACKEND  X", "b1 ##"})
	e.want("title", "text", " BACKEND  X", "b1 ##")
	s.print("summary")
	e.want("title", "text", "summary")
	if e.hidden {
		t.Error("the cursor stays hidden")
	}
	s.print("end")
	e.want("title", "text", "summary", "end")
}

func TestScreenFitsTheTerminal(t *testing.T) {
	s, e := newTerminal(t, 5, 3)
	s.draw([]string{"123456789", "2", "3", "4"})
	s.draw([]string{"abcdefghi", "2", "3", "4"})
	e.want("abcd", "2")
}

// A terminal that changed its size begins anew, since the old block may have wrapped.
func TestScreenAfterResize(t *testing.T) {
	s, e := newTerminal(t, 80, 24)
	s.print("title")
	s.draw([]string{"a", "b"})
	s.size = func() (int, int) { return 60, 24 }
	s.draw([]string{"c", "d"})
	e.want("c", "d")
	s.draw([]string{"e"})
	e.want("e")
}

func TestScreenColorsAreOfNoWidth(t *testing.T) {
	strip := regexp.MustCompile(`\x1b\[[0-9]*m`)
	for _, line := range []string{" BACKEND   CALLS", " RPC KIND  CALLS", " b1  5 ###  1", " plain", " grpc_proxy demo: x"} {
		painted := paint(line)
		if got := strip.ReplaceAllString(painted, ""); got != line {
			t.Errorf("%q became %q", line, got)
		}
		if strings.Contains(painted, "\x1b") == (line == " plain") {
			t.Errorf("%q became %q", line, painted)
		}
	}
}

// What is not a terminal gets lines, without any control sequence.
func TestScreenOfAFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := newScreen(f, false)
	if s.live {
		t.Error("a file counts as a terminal")
	}
	s.print("a", "b")
	if got, err := os.ReadFile(f.Name()); err != nil || string(got) != "a\nb\n" {
		t.Errorf("%q, %v", got, err)
	}
	if width, height := s.size(); width != 80 || height != 24 {
		t.Errorf("%d × %d", width, height)
	}
}

func TestScreenKeepsTheFirstError(t *testing.T) {
	out := &brokenWriter{}
	s := &screen{out: out}
	s.print("a")
	s.print("b")
	if !errors.Is(s.err, errBroken) || out.writes != 1 {
		t.Errorf("error %v after %d writes", s.err, out.writes)
	}
}

var errBroken = errors.New("broken")

type brokenWriter struct{ writes int }

func (w *brokenWriter) Write([]byte) (int, error) {
	w.writes++
	return 0, errBroken
}
