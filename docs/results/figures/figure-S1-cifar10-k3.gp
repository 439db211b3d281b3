# gnuplot figure-S1-cifar10-k3.gp, in this folder, draws figure-S1-cifar10-k3.svg and figure-S1-cifar10-k3.png.
set datafile separator ','
set key off
do for [format in "svg png"] {
  if (format eq "svg") { set terminal svg size 840,820 font 'sans,13' background 'white' }
  else { set terminal pngcairo size 840,820 font 'sans,10' background 'white' }
  set output 'figure-S1-cifar10-k3.'.format
  set multiplot layout 2,2 title 'CIFAR-10, kernel 3, 150 epochs; loss, with lines at 0.7, 1, 1.4, 2, 2.8, 4, 5.6 and 8'
  set size ratio 1
  set logscale cb
  set cbrange [0.6953291340945871:13.906582681891742]
  set palette defined (0 '#440154', 1 '#3b528b', 2 '#21908d', 3 '#5dc963', 4 '#fde725')
  set cbtics (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 11, 16)
  set autoscale xfix
  set autoscale yfix
  set tics out nomirror
  set datafile separator comma
  set table $image
  plot 'figure-S1-cifar10-k3-compact.csv' skip 1 using 1:2:3 with table
  set contour base
  unset surface
  set cntrparam levels discrete 0.7,1,1.4,2,2.8,4,5.6,8
  set table $lines
  splot 'figure-S1-cifar10-k3-compact.csv' skip 1 using 1:2:3
  unset table
  unset contour
  set surface
  set datafile separator whitespace
  set title 'SmallNet' noenhanced
  plot $image using 1:2:3 with image, $lines using 1:2 with lines linewidth 0.7 linecolor rgb 'white'
  set datafile separator comma
  set table $image
  plot 'figure-S1-cifar10-k3-fc.csv' skip 1 using 1:2:3 with table
  set contour base
  unset surface
  set cntrparam levels discrete 0.7,1,1.4,2,2.8,4,5.6,8
  set table $lines
  splot 'figure-S1-cifar10-k3-fc.csv' skip 1 using 1:2:3
  unset table
  unset contour
  set surface
  set datafile separator whitespace
  set title 'FC(Arora18)' noenhanced
  plot $image using 1:2:3 with image, $lines using 1:2 with lines linewidth 0.7 linecolor rgb 'white'
  set datafile separator comma
  set table $image
  plot 'figure-S1-cifar10-k3-cl.csv' skip 1 using 1:2:3 with table
  set contour base
  unset surface
  set cntrparam levels discrete 0.7,1,1.4,2,2.8,4,5.6,8
  set table $lines
  splot 'figure-S1-cifar10-k3-cl.csv' skip 1 using 1:2:3
  unset table
  unset contour
  set surface
  set datafile separator whitespace
  set title 'ExpandNet-CL' noenhanced
  plot $image using 1:2:3 with image, $lines using 1:2 with lines linewidth 0.7 linecolor rgb 'white'
  set datafile separator comma
  set table $image
  plot 'figure-S1-cifar10-k3-cl+fc.csv' skip 1 using 1:2:3 with table
  set contour base
  unset surface
  set cntrparam levels discrete 0.7,1,1.4,2,2.8,4,5.6,8
  set table $lines
  splot 'figure-S1-cifar10-k3-cl+fc.csv' skip 1 using 1:2:3
  unset table
  unset contour
  set surface
  set datafile separator whitespace
  set title 'ExpandNet-CL+FC' noenhanced
  plot $image using 1:2:3 with image, $lines using 1:2 with lines linewidth 0.7 linecolor rgb 'white'
  unset multiplot
  unset output
}
